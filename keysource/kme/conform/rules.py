"""What a strict KME looks at in an SAE, and the book in which it notes what it saw.  No network here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from keysource.kme.conform.report import Outcome, Verdict

_MOST = 3  # sentences of one rule that a report quotes


@dataclass(frozen=True, slots=True)
class Rule:
    """``outcome`` is what breaking it amounts to: against the standard, or unwise."""

    clause: str
    requirement: str
    outcome: Outcome = Outcome.FAIL


RULES = {
    "tls": Rule("5.1", "The SAE connects with TLS 1.2 or newer and shows its certificate."),
    "path": Rule("5", "It asks for nothing but status, enc_keys and dec_keys, with SAE IDs that are URL-encoded."),
    "get": Rule("5.3, 5.4", "A GET carries number and size, or exactly one key_ID; all else goes as a POST."),
    "body": Rule("5.3, 5.4", "A POST has a JSON object, as application/json."),
    "types": Rule("6.2, 6.4", "Every field has its type; what is not there is absent, not null."),
    "fields": Rule("6.2, 6.4", "There are no fields that the standard does not have.", Outcome.WARN),
    "vendor": Rule("6.2", "Names of extension parameters have a vendor's prefix that ends in _.", Outcome.WARN),
    "bounds": Rule("6.1, 6.2", "Sizes and numbers are within what the KME's status says."),
    "slave": Rule("5.2, 5.3", "The SAE ID in the path is another SAE's, and one that it may share with."),
    "own": Rule("5.4", "It asks only for keys that were drawn for it, under their master's SAE ID."),
    "once": Rule("5.4", "A key that was delivered has left the pool, and is not asked for again."),
    "lost": Rule(
        "5.4", "After an answer that was lost, the same key_ID is not asked for again: it may be gone.", Outcome.WARN
    ),
    "patience": Rule("tables 4, 6, 8", "After a 503 it waits as long as Retry-After says.", Outcome.WARN),
    "redirect": Rule(
        "5.1", "It follows no redirect: it is the KME of the certificate that it wants keys from.", Outcome.WARN
    ),
    "length": Rule("6.2, 6.3", "A key of another size than was asked for is not used.", Outcome.WARN),
    "equal": Rule("6.3", "Bytes that came before under another key_ID are not used.", Outcome.WARN),
}


@dataclass(slots=True)
class _Noted:
    seen: int = 0
    broken: list[str] = field(default_factory=list)
    times: int = 0


class Book:
    """What was seen of each SAE.  ``told`` hears of a broken rule at once: SAE, rule, sentence."""

    def __init__(self, told: Callable[[str, Rule, str], None] = lambda sae, rule, sentence: None) -> None:
        self._told = told
        self._noted: dict[str, dict[str, _Noted]] = {}

    def kept(self, sae: str, *rules: str) -> None:
        """The SAE had an occasion to break them, and did not."""
        for rule in rules:
            self._of(sae, rule).seen += 1

    def broken(self, sae: str, rule: str, sentence: str) -> None:
        noted = self._of(sae, rule)
        noted.seen, noted.times = noted.seen + 1, noted.times + 1
        if sentence not in noted.broken and len(noted.broken) < _MOST:
            noted.broken.append(sentence)
        self._told(sae, RULES[rule], sentence)

    def look(self, sae: str, rule: str, sentence: str) -> None:
        """:meth:`broken` where there is a sentence, :meth:`kept` where it is empty."""
        if sentence:
            self.broken(sae, rule, sentence)
        else:
            self.kept(sae, rule)

    @property
    def saes(self) -> list[str]:
        return sorted(self._noted)

    def verdicts(self, sae: str) -> list[Verdict]:
        """One for each rule; what an SAE had no occasion for is skipped."""
        return [self._verdict(sae, name, rule) for name, rule in RULES.items()]

    def _verdict(self, sae: str, name: str, rule: Rule) -> Verdict:
        noted = self._of(sae, name)
        if noted.broken:
            found = "; ".join(noted.broken) + (f" ({noted.times} times)" if noted.times > 1 else "")
            return Verdict(name, rule.clause, rule.requirement, rule.outcome, found)
        if not noted.seen:
            return Verdict(name, rule.clause, rule.requirement, Outcome.SKIP, "there was no occasion")
        return Verdict(name, rule.clause, rule.requirement, Outcome.PASS, f"{noted.seen} times")

    def _of(self, sae: str, rule: str) -> _Noted:
        assert rule in RULES
        return self._noted.setdefault(sae, {}).setdefault(rule, _Noted())
