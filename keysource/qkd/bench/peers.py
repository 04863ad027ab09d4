"""What other packages offer as Cascade, called as their own examples do, where they are installed."""

from __future__ import annotations

import sys

import numpy as np

from keysource.qkd.bench.correction import RATIOS, Correct, Corrected, measured
from keysource.qkd.distill.bits import Bits


def peers(quick: bool) -> list[Corrected]:
    found = []
    for who, make, bits, count in (("tno qkd_key_rate", _tno, 1 << 14, 2), ("qkdpy", _qkdpy, 2000, 4)):
        correct = make()
        if correct is None:
            print(f"{who}: not installed, left out", file=sys.stderr)
            continue
        found += [measured(who, correct, bits, ratio, 1 if quick else count) for ratio in RATIOS]
    return found


def _tno() -> Correct | None:
    try:
        from tno.quantum.communication.qkd_key_rate import classical  # type: ignore[import-not-found,unused-ignore]
        from tno.quantum.communication.qkd_key_rate.classical import (  # type: ignore[import-not-found,unused-ignore]
            cascade,
        )
    except ImportError:
        return None
    passes = 8

    def correct(alice: Bits, bob: Bits, ratio: float) -> tuple[Bits, int | None, int | None]:
        permutations = classical.Permutations.random_permutation(number_of_passes=passes, message_size=len(alice))
        strategy = classical.ParityStrategy(
            error_rate=ratio, sampling_fraction=0.34, number_of_passes=passes, switch_after_pass=None
        )
        hers, his = (classical.Message([int(bit) for bit in bits]) for bits in (alice, bob))
        sender = cascade.CascadeSender(message=hers, permutations=permutations)
        receiver = cascade.CascadeReceiver(message=his, permutations=permutations, parity_strategy=strategy)
        result = cascade.CascadeCorrector(alice=sender, bob=receiver).correct_errors()
        fixed = np.array([result.output_bob[i] for i in range(len(alice))], dtype=np.uint8)
        return fixed, int(result.number_of_exposed_bits), None

    return correct


def _qkdpy() -> Correct | None:
    try:
        from qkdpy.key_management.error_correction import (  # type: ignore[import-not-found,unused-ignore]
            ErrorCorrection,
        )
    except ImportError:
        return None

    def correct(alice: Bits, bob: Bits, ratio: float) -> tuple[Bits, int | None, int | None]:
        hers, his = ErrorCorrection.cascade(alice.tolist(), bob.tolist())
        if (np.array(hers) == alice).all():
            return np.array(his, dtype=np.uint8), None, None
        order: Bits = (
            alice if hers == his else alice ^ np.uint8(1)
        )  # it hands back both keys in another order: equal, or failed
        return order, None, None

    return correct
