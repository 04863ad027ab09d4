"""Configuration, scaffold, PKI and command line of ``qvpn-kme``: one clear sentence for each mistake."""

from __future__ import annotations

import datetime
import ipaddress

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from typer.testing import CliRunner

from keysource.kme import cli
from keysource.kme.config import EXAMPLE, ConfigError, StoreTable, load
from keysource.kme.pki import Authority
from keysource.kme.scaffold import ScaffoldError, SitePlan, write_pair

runner = CliRunner()


@pytest.fixture
def example(tmp_path):
    def write(*changes):
        text = EXAMPLE
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        file = tmp_path / "kme.toml"
        file.write_text(text)
        return file

    return write


def test_the_example_is_a_configuration(example, tmp_path):
    config = load(example())
    assert config.kme.id == "kme-alice"
    assert (config.kme.listen.host, config.kme.listen.port) == ("192.0.2.1", 8443)
    assert config.path(config.kme.store) == tmp_path / "state/kme.sqlite"
    assert config.control_path == tmp_path / "state/control.sock"
    assert config.limits.max_key_per_request == 128
    assert config.peer_of("sae-bob").id == "kme-bob"
    assert config.peer_of("sae-alice") is None
    assert config.local_sae("sae-alice").may_share_with == ["sae-bob"]


STORE = EXAMPLE[EXAMPLE.index("# [store]") : EXAMPLE.index("[limits]")]


def uncommented(text):
    return [line.removeprefix("# ") if line.startswith("# ") else line for line in text.splitlines()]


@pytest.fixture
def shared(example):
    """The example with its PostgreSQL, changed."""

    def make(*changes):
        store = "\n".join(uncommented(STORE)) + "\n"
        file = [("# [store]", store + "\n# [store]"), ('store = "state/kme.sqlite"', "")]
        return example(*file, ("# site_key", "site_key"), *changes)

    return make


def test_the_table_of_the_database_has_the_defaults_that_the_example_shows(shared):
    config = load(shared())
    told = config.store.model_dump(exclude={"kind", "conninfo", "password"})
    assert told == StoreTable().model_dump(exclude={"kind", "conninfo", "password"})
    assert config.control_path.parts[-2:] == ("state", "control.sock")
    assert "10.0.0.5" not in repr(config.store)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((" user=qvpn sslmode", " password=x user=qvpn sslmode"), "conninfo must not have a password"),
        (('conninfo = "host', 'conninfo = "postgresql://host'), "conninfo must be words"),
        (('kind = "postgresql"', 'kind = "sqlite"'), 'belongs to kind = "postgresql"'),
        (("site_key = ", "# site_key = "), "site_key: all processes at one PostgreSQL need the same one"),
        (("# control = ", 'store = "x"\n# control = '), "the file of an SQLite store"),
    ],
)
def test_a_mistake_about_the_database_is_one_sentence(shared, change, says):
    with pytest.raises(ConfigError) as caught:
        load(shared(change))
    assert says in str(caught.value)
    assert "password=x" not in str(caught.value)


def test_only_a_process_at_a_database_can_do_without_a_device(example, shared):
    change = ('device = "link/device.sock"', "")
    assert load(shared(change)).link[0].device is None
    with pytest.raises(ConfigError, match="only one of several processes"):
        load(example(change))


def test_every_commented_key_of_the_example_exists_with_its_default(example, tmp_path):
    """What the example shows as optional is accepted when the comment sign goes."""
    file = tmp_path / "all.toml"
    file.write_text("\n".join(uncommented(EXAMPLE.replace(STORE, ""))))
    config = load(file)
    assert config.limits == load(example()).limits
    assert config.kme.control == "state/control.sock"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("listen =", "lisen ="), "[kme] lisen: no such key"),
        (("version = 1", "version = 1\nnonsense = 2"), "nonsense: no such key"),
        (("version = 1", "version = 2"), "version: "),
        (('id = "kme-alice"', 'id = "kme-alice"\nsae_from = "cn"'), "[kme] sae_from: no such key"),
        (("version = 1", "version = 1\n_base = '/'"), "_base: no such key"),
        (('"192.0.2.1:8443"', '"192.0.2.1"'), "[kme] listen: '192.0.2.1' is not HOST:PORT"),
        (('"192.0.2.1:8443"', '"192.0.2.1:99999"'), "[kme] listen: "),
        (('"192.0.2.1:8443"', "8443"), "[kme] listen: "),
        (('"192.0.2.1:8443"', '"2001:db8::1:8443"'), "[kme] listen: '2001:db8::1:8443': an IPv6 address stands in"),
        (("https://", "http://"), '[[peer_kme]] number 1 url: it must be "https://HOST:PORT"'),
        (('saes = ["sae-bob"]', 'saes = "sae-bob"'), "[[peer_kme]] number 1 saes: "),
        (('saes = ["sae-bob"]', "saes = []"), "[[peer_kme]] number 1 saes: "),
        (('saes = ["sae-bob"]', 'saes = [".."]'), "[[peer_kme]] number 1 saes.0: an SAE ID has"),
        (('id = "sae-alice"', 'id = "sae-bob"'), "'sae-bob' stands for two things"),
        (('id = "sae-alice"', 'id = "kme-bob"'), "'kme-bob' stands for two things"),
        (('with = ["sae-bob"]', 'with = ["sae-x"]'), "[[sae]] 'sae-alice' may share with 'sae-x'"),
        (('peer_kme = "kme-bob"', 'peer_kme = "kme-x"'), "[[link]] peer_kme 'kme-x'"),
        (("# max_key_per_request = 128", "max_key_per_request = 0"), "[limits] max_key_per_request: "),
        (('device = "link/device.sock"', "device = 7"), "[[link]] number 1 device: "),
        (("version = 1", "version = "), "not TOML: "),
    ],
)
def test_a_mistake_is_named_by_file_table_and_key(example, change, says):
    file = example(change)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert any(line.startswith(f"{file}: {says}") for line in str(caught.value).splitlines()), caught.value
    result = runner.invoke(cli.app, ["check", str(file)])
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_missing_file_and_missing_tables(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.toml: No such file"):
        load(tmp_path / "nothing.toml")
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    with pytest.raises(ConfigError) as caught:
        load(empty)
    assert [line.rpartition(": ")[2] for line in str(caught.value).splitlines()] == ["is required"] * 5


def plans(**changes):
    left = SitePlan("alice", "kme-a.example", 8443, 8444, "127.0.0.1")
    right = SitePlan("bob", "2001:db8::2", **changes)
    return left, right


def test_a_pair_on_two_hosts_loads_and_checks(tmp_path):
    left, right = plans()
    files = write_pair(tmp_path, left, right)
    for file, site, other in zip(files, (left, right), (right, left), strict=True):
        config = load(file)
        assert config.kme.id == site.kme_id
        assert [sae.id for sae in config.sae] == [site.sae_id]
        assert config.peer_kme[0].saes == [other.sae_id]
        result = runner.invoke(cli.app, ["check", str(file)])
        assert (result.exit_code, "without a mistake" in result.output) == (0, True)
    assert load(files[0]).peer_kme[0].url == "https://[2001:db8::2]:8444"
    assert load(files[1]).peer_kme[0].url == "https://kme-a.example:8444"
    assert load(files[0]).kme.listen.host == "127.0.0.1"
    assert left.url == "https://127.0.0.1:8443"
    keys = list(tmp_path.rglob("*.key"))
    assert sorted(path.name for path in keys) == ["kme-alice.key", "kme-bob.key", "sae-alice.key", "sae-bob.key"]
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}


def test_the_sites_share_nothing_secret(tmp_path):
    write_pair(tmp_path, *plans())
    secret = {site: {p.read_bytes() for p in (tmp_path / site).rglob("*.key")} for site in ("alice", "bob")}
    assert not secret["alice"] & secret["bob"]
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert everything.count(b"PRIVATE KEY-----") == 2 * 4  # four keys, begin and end: the authority's is not there


@pytest.mark.parametrize(
    ("sites", "says"),
    [
        ((SitePlan("a", "h1"), SitePlan("a", "h2")), "same name|have the name"),
        ((SitePlan("a", "h"), SitePlan("b", "h")), "two listeners"),
        ((SitePlan("a", "h1", 8443, 8443), SitePlan("b", "h2")), "two listeners"),
        ((SitePlan("../a", "h1"), SitePlan("b", "h2")), "site's name"),
        ((SitePlan("a", 'h"1'), SitePlan("b", "h2")), "cannot stand"),
        ((SitePlan("a", ""), SitePlan("b", "h2")), "needs a host"),
        ((SitePlan("a", "h1", 0), SitePlan("b", "h2")), "port"),
    ],
)
def test_a_pair_that_cannot_be_is_refused_and_nothing_written(tmp_path, sites, says):
    with pytest.raises(ScaffoldError, match=says):
        write_pair(tmp_path, *sites)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "alice").mkdir()
    (tmp_path / "alice" / "qvpn.toml").write_text("other files may be there")
    write_pair(tmp_path, *plans())
    with pytest.raises(ScaffoldError, match="exists already"):
        write_pair(tmp_path, *plans())


def test_the_pair_command(tmp_path):
    options = ["--left-host", "10.0.0.1", "--right-host", "10.0.0.2", "--left-device", "qkd.sock"]
    result = runner.invoke(cli.app, ["pair", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert f"on 10.0.0.1: qvpn-kme serve {tmp_path}/alice/kme.toml" in result.output
    assert load(tmp_path / "alice" / "kme.toml").link[0].device == "qkd.sock"
    assert load(tmp_path / "bob" / "kme.toml").link[0].device == "link/device.sock"
    assert runner.invoke(cli.app, ["pair", str(tmp_path), *options]).exit_code == 2
    assert runner.invoke(cli.app, ["pair", str(tmp_path)]).exit_code == 2


def test_a_private_key_that_others_can_read_is_refused(tmp_path):
    [file, _] = write_pair(tmp_path, *plans())
    (tmp_path / "alice/pki/kme-alice.key").chmod(0o640)
    for command in ("check", "serve"):
        result = runner.invoke(cli.app, [command, str(file)])
        assert result.exit_code == 2
        assert "[kme] private_key" in result.output.replace("\n", " ")
        assert "0600" in result.output


def test_a_missing_certificate_is_named(tmp_path):
    [file, _] = write_pair(tmp_path, *plans())
    (tmp_path / "alice/pki/ca.crt").unlink()
    result = runner.invoke(cli.app, ["check", str(file)])
    assert result.exit_code == 2
    assert "[kme] ca" in result.output


def test_wrong_usage_is_exit_2(tmp_path):
    [file, _] = write_pair(tmp_path, *plans())
    for arguments in ([], ["serve"], ["nonsense"], ["serve", str(file), "--fault", "x"], ["serve", "/nothing"]):
        result = runner.invoke(cli.app, arguments)
        assert result.exit_code == 2, arguments
    assert runner.invoke(cli.app, ["status", str(file)]).exit_code == 1


def test_example_prints_the_example():
    assert runner.invoke(cli.app, ["example"]).output == EXAMPLE


# Certificates


def extension(certificate, kind):
    return certificate.extensions.get_extension_for_class(kind).value


def test_certificates_say_what_they_are_for():
    authority = Authority("test CA", days=10)
    ca = x509.load_pem_x509_certificate(authority.certificate)
    kme = x509.load_pem_x509_certificate(authority.kme("kme-a", ["kme-a.example", "192.0.2.1", "::1"]).certificate)
    sae = x509.load_pem_x509_certificate(authority.sae("sae-a").certificate)
    assert extension(ca, x509.BasicConstraints).ca
    assert extension(ca, x509.BasicConstraints).path_length == 0
    assert extension(ca, x509.KeyUsage).key_cert_sign
    for leaf in (kme, sae):
        leaf.verify_directly_issued_by(ca)
        assert not extension(leaf, x509.BasicConstraints).ca
        assert not extension(leaf, x509.KeyUsage).key_cert_sign
        assert leaf.not_valid_after_utc - leaf.not_valid_before_utc < datetime.timedelta(days=11)
    names = extension(kme, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == ["kme-a.example"]
    addresses = [ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("::1")]
    assert names.get_values_for_type(x509.IPAddress) == addresses
    assert list(extension(sae, x509.ExtendedKeyUsage)) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert ExtendedKeyUsageOID.SERVER_AUTH in list(extension(kme, x509.ExtendedKeyUsage))
    assert "PRIVATE" not in repr(authority.sae("x"))
