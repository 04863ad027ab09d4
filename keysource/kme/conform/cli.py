"""``qvpn-kme conform``: a KME of anybody's against the standard, or, with ``--sae``, an SAE of anybody's."""

from __future__ import annotations

import asyncio
import ssl
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from keysource.kme.conform.report import Verdict

File = Annotated[Path | None, typer.Option(metavar="FILE")]


def conform(
    url: Annotated[str, typer.Argument(metavar="[URL]", help="The KME of the master SAE, https://HOST:PORT.")] = "",
    slave_url: Annotated[str, typer.Option(metavar="URL", help="The slave SAE's KME, if another.")] = "",
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="Authority of the KMEs' certificates, PEM.")] = None,
    master: Annotated[str, typer.Option(metavar="SAE", help="SAE ID that draws keys.")] = "",
    master_cert: File = None,
    master_key: File = None,
    slave: Annotated[str, typer.Option(metavar="SAE", help="SAE ID that fetches them.")] = "",
    slave_cert: File = None,
    slave_key: File = None,
    sae: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Examine an SAE: be a strict KME, with certificates for it in DIR."),
    ] = None,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="With --sae: where.")] = "127.0.0.1:8443",
    saes: Annotated[str, typer.Option(metavar="ONE,OTHER", help="With --sae: the two SAE IDs.")] = "sae-one,sae-two",
    lessons: Annotated[
        bool, typer.Option(help="With --sae: now and then a 503, a reset, a redirect, a bad key.")
    ] = True,
    seconds: Annotated[float, typer.Option(min=0, help="With --sae: how long; 0: until Ctrl-C.")] = 0,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a report in Markdown.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
) -> None:
    """Examine a KME clause by clause against ETSI GS QKD 014 (about a hundred keys), or with --sae an SAE."""
    from keysource.kme.conform import report as reports

    if bool(url) == (sae is not None):
        _fail("either the URL of a KME, or --sae DIR")
    if sae is not None:
        subject, verdicts = _examine_saes(sae, listen, saes, lessons, seconds, quiet=as_json)
    else:
        files = (ca, master_cert, master_key, slave_cert, slave_key)
        if not master or not slave or None in files:
            _fail("--ca, --master, --master-cert, --master-key, --slave, --slave-cert and --slave-key are needed")
        given = [file for file in files if file is not None]
        subject, verdicts = url, _examine_kme(url, slave_url or url, (master, slave), given, as_json)
    if as_json:
        print(reports.as_json(subject, verdicts))
    else:
        print(reports.summary(verdicts))
    if report is not None:
        try:
            report.write_text(reports.as_markdown(subject, verdicts))
        except OSError as error:
            _fail(f"{report}: {error.strerror}")
    raise typer.Exit(0 if reports.conforms(verdicts) else 1)


def _examine_kme(url: str, slave_url: str, saes: tuple[str, str], files: list[Path], quiet: bool) -> list[Verdict]:
    from keysource import tls
    from keysource.etsi014.settings import check_sae
    from keysource.kme.conform.caller import Caller, Notebook
    from keysource.kme.conform.kit import Kit, examine
    from keysource.private import read_secret
    from keysource.remote import check_url

    def said(verdict: Verdict) -> None:
        if not quiet:
            print(f"{verdict.outcome.value.upper():4}  {verdict.clause}  {verdict.name}: {verdict.found}", flush=True)

    async def run() -> list[Verdict]:
        notebook = Notebook()
        callers = [
            Caller(check_url(place, "https", path=True, port=False), check_sae(name), context, notebook)
            for place, name, context in zip((url, slave_url), saes, contexts, strict=True)
        ]
        try:
            return await examine(Kit(callers[0], callers[1], authority, notebook), said)
        finally:
            for caller in callers:
                await caller.aclose()

    try:
        authority, own, slaves = (files[place].read_bytes() for place in (0, 1, 3))
        own_key, slaves_key = read_secret(files[2]), read_secret(files[4])

        def master_context() -> ssl.SSLContext:
            return tls.client_context(authority, own, own_key)

        def slave_context() -> ssl.SSLContext:
            return tls.client_context(authority, slaves, slaves_key)

        contexts = (master_context, slave_context)
        return asyncio.run(run())
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        _fail(str(error))


def _examine_saes(
    folder: Path, listen: str, names: str, lessons: bool, seconds: float, *, quiet: bool
) -> tuple[str, list[Verdict]]:
    from keysource.etsi014.settings import check_sae
    from keysource.kme.conform.rules import Book, Rule
    from keysource.kme.conform.strictserve import ServeError, prepare, serve
    from keysource.settings import Address

    def told(sae: str, rule: Rule, sentence: str) -> None:
        if not quiet:
            print(f"{rule.outcome.value.upper():4}  {rule.clause}  {sae}: {sentence}", flush=True)

    def ready(url: str) -> None:
        if not quiet:
            print(f"strict KME at {url}, for {names}; certificates in {folder}", flush=True)
            print("Ctrl-C ends it, and reports", flush=True)

    book = Book(told)
    try:
        address = Address.parse(listen, lowest_port=0)
        one, other = (check_sae(name) for name in names.split(","))
        if one == other or "/" in one + other:
            raise ValueError("--saes: two names, without a slash")
        prepare(folder, (one, other), address.host)
        asyncio.run(serve(folder, address, (one, other), book, lessons=lessons, seconds=seconds, ready=ready))
    except (ServeError, ValueError) as error:
        _fail(str(error))
    verdicts = [_of(sae, verdict) for sae in book.saes for verdict in book.verdicts(sae)]
    return f"SAEs {', '.join(book.saes) or '(none came)'}", verdicts


def _of(sae: str, verdict: Verdict) -> Verdict:
    from dataclasses import replace

    return replace(verdict, found=f"{sae}: {verdict.found}")


def _fail(message: str) -> NoReturn:
    print(f"qvpn-kme: {message}", file=sys.stderr)
    raise typer.Exit(2)
