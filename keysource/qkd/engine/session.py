"""One classical connection's life: greeting, then block after block, at Alice's and at Bob's.

Alice begins blocks.  Before each, Bob sends ``INVITE`` when his stock has room and his hardware is ready; Alice
starts when hers are too.  Who waits sends ``PING``, so that both know the other lives.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from keysource.base import End
from keysource.qkd.distill.alice import AliceBlock
from keysource.qkd.distill.bob import BobBlock
from keysource.qkd.distill.party import Party
from keysource.qkd.distill.wire import Frame, Kind, Start
from keysource.qkd.engine.ahead import Ahead
from keysource.qkd.engine.channel import Channel
from keysource.qkd.engine.drive import drive
from keysource.qkd.engine.end import LinkEnd
from keysource.qkd.engine.hardware import RUN_BYTES
from keysource.qkd.engine.hello import MAX_HELLO, Greeting, lost_blocks
from keysource.qkd.engine.introduce import answer_untrusted
from keysource.qkd.errors import BadFrame, Disagreement, Forged, LinkError, PeerLost
from keysource.qkd.pad import SIGNED, Claims

_POLL = 0.05
_PING_EVERY = 3.0
_IDLE_PATIENCE = 15.0
_HELLO_PATIENCE = 5.0
SESSION_BYTES = 32


async def greet_bob(link: LinkEnd, channel: Channel) -> None:
    """Bob's greeting; names the session to his hardware.

    Raises :class:`LinkError`; :class:`RolledBackLink` ends the process.
    """
    greeting = Greeting(End.B, link.state.link_key(b"hello"), link.agreed)
    await channel.send(greeting.hello())
    greeting.take_hello_untrusted(await channel.receive(_HELLO_PATIENCE, MAX_HELLO))
    mine = link.state.claims(frozenset(link.held))
    await channel.send(greeting.claims(mine))
    theirs = greeting.take_claims_untrusted(await channel.receive(_HELLO_PATIENCE, MAX_HELLO))
    _settle(link, mine, theirs)
    _name_session(link, greeting)


async def prove_alice(link: LinkEnd, channel: Channel) -> tuple[Greeting, Claims]:
    """Alice's greeting up to Bob's proof; her claims follow when the old session has ended.  A Bob who has no secret
    of this link yet, and signs for it, gets it and nothing else."""
    greeting = Greeting(End.A, link.state.link_key(b"hello"), link.agreed)
    first = await channel.receive(_HELLO_PATIENCE, MAX_HELLO)
    if first.kind is Kind.INTRODUCE and link.signers is not None:
        await channel.send(answer_untrusted(link.signers, link.state.head, first))
        raise PeerLost("the other end has been given the link's first secret and will come again")
    greeting.take_hello_untrusted(first)
    await channel.send(greeting.hello())
    proof = await channel.receive(_HELLO_PATIENCE, MAX_HELLO)
    try:
        return greeting, greeting.take_claims_untrusted(proof)
    except Disagreement:  # it has our pad: let it see why
        await channel.send(greeting.claims(link.state.claims(frozenset(link.held))))
        raise


async def greet_alice(link: LinkEnd, channel: Channel, greeting: Greeting, theirs: Claims) -> None:
    mine = link.state.claims(frozenset(link.held))
    await channel.send(greeting.claims(mine))
    _settle(link, mine, theirs)
    _name_session(link, greeting)


def _name_session(link: LinkEnd, greeting: Greeting) -> None:
    link.session = greeting.run(SESSION_BYTES)
    link.hardware.run = link.session[:RUN_BYTES]


def _settle(link: LinkEnd, mine: Claims, theirs: Claims) -> None:
    link.state.check_rollback(theirs)
    if mine.seen > theirs.spent:
        raise LinkError("the other end's state is older than what this end has seen of it: it must refuse to run")
    link.state.settle(theirs)
    if lost_blocks(mine, theirs):
        link.void()


async def alice_session(link: LinkEnd, channel: Channel) -> None:
    """Blocks until the connection ends.  Raises :class:`LinkError`."""
    async with _session(link) as ahead:
        while True:
            await _idle(channel, Kind.INVITE)
            await _until_ready(link, channel, link.pause)
            state = link.state
            number, block = state.next_ticket(), state.next_block
            refills = state.refills_wanted(link.most_refills)
            ticket = link.authenticator(number, block)
            party = AliceBlock(link.terms, Start(block, number, state.spent, refills), ticket)
            party.guard = link.guard
            await _block(link, channel, party, ahead)


async def bob_session(link: LinkEnd, channel: Channel) -> None:
    """Blocks until the connection ends.  Raises :class:`LinkError`."""
    async with _session(link) as ahead:
        while True:
            await _until_ready(link, channel)
            await channel.send(Frame(Kind.INVITE))
            start = Start.from_untrusted((await _idle(channel, Kind.START)).payload)
            link.state.next_ticket()  # where it is used up the process says so; that is no forgery
            if start.refills != link.state.refills_wanted(link.most_refills):
                raise BadFrame("a block with another refill than ours")
            ticket = link.authenticator(start.ticket, start.block)
            party = BobBlock(link.terms, start, ticket)
            party.spent = link.state.spent
            party.guard = link.guard
            await _block(link, channel, party, ahead)


@contextlib.asynccontextmanager
async def _session(link: LinkEnd) -> AsyncIterator[Ahead]:
    link.session_up = True
    link.show()
    ahead = Ahead(link.hardware, link.may_look_ahead)
    try:
        yield ahead
    except LinkError as error:
        link.trouble = str(error)
        raise
    finally:
        await ahead.aclose()
        link.session_up = False
        link.show()


async def _block(link: LinkEnd, channel: Channel, party: Party, ahead: Ahead) -> None:
    """One block to its end.  An error burns its ticket and ends the connection."""

    def keep(tickets: list[bytes]) -> None:
        if link.agreed.repeatable:
            return  # pad that anybody can work out is none
        link.state.refill(party.block, tickets, signed=party.ticket.number == SIGNED)

    try:
        party.seed = await ahead.seed(party.block)
        outcome = await drive(party, channel, ahead, keep, link.patience)
    except (BadFrame, Forged) as error:
        link.broken(error)
        link.tampered(str(error))
        raise
    except LinkError as error:
        link.broken(error)
        raise
    link.state.saw(outcome.peer_spent)  # only now: the transcript that said it is authenticated
    link.finish(outcome, asyncio.get_running_loop().time())


async def _idle(channel: Channel, kind: Kind) -> Frame:
    """The next frame of this kind; pings before it only say that the other end lives."""
    while (frame := await channel.receive(_IDLE_PATIENCE)).kind is Kind.PING:
        pass
    if frame.kind is not kind:
        raise BadFrame(f"a {frame.kind.name} frame between blocks")
    return frame


async def _until_ready(link: LinkEnd, channel: Channel, pause: float = 0.0) -> None:
    """Wait ``pause`` seconds, and for room and hardware, with a sign of life now and then."""
    loop = asyncio.get_running_loop()
    begun = last = loop.time()
    shown: str | None = None
    while (waiting := link.waiting_for()) is not None or loop.time() - begun < pause:
        if waiting != shown:
            link.show()
            shown = waiting
        if loop.time() - last >= _PING_EVERY:
            await channel.send(Frame(Kind.PING))
            last = loop.time()
        if channel.closed:
            raise PeerLost("the peer closed the classical channel")
        await asyncio.sleep(_POLL)
    if shown is not None:
        link.show()
