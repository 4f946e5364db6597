"""Every way to log in, by settings and by the environment of a worker program.

And a prefix keeps deployments apart.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.exceptions import BackendError, ConnectionFailed
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.nats.processes import Fleet, MakeServer
from tests.running import has

SOON = 15.0


async def run_a_job(server: EmbeddedServer, settings: Settings, directory: Path) -> None:
    """Run a job: the producer has these settings, and a worker program in its environment."""
    changed = settings.model_dump(exclude_unset=True)
    environment = {f"ASYNCMQ_NATS_{name.upper()}": str(value) for name, value in changed.items()}
    fleet = Fleet(server.url, directory, environment=environment)
    try:
        async with NATSBackend(server.url, settings=settings) as backend:
            queue = Queue("fleet", backend)
            with anyio.fail_after(SOON):
                job_id = await queue.add(
                    "last", [2.0]
                )  # longer than its lease: the connection that extends leases is logged in too
                await fleet.start("first")
                assert await queue.wait_for(job_id) == "first"
        assert fleet.watched.runs("last") == ["first"]
    finally:
        fleet.stop()


async def assert_refused(server: EmbeddedServer, settings: Settings) -> None:
    backend = NATSBackend(server.url, settings=settings.model_copy(update={"connect_timeout": 0.5}))
    with anyio.fail_after(SOON), pytest.raises(ConnectionFailed):
        await backend.connect()


async def test_token(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server('authorization { token: "s3cr3t" }')
    await assert_refused(server, Settings(token="wrong"))
    await run_a_job(server, Settings(token="s3cr3t", stalled_after=1), tmp_path / "fleet")


async def test_user_and_password(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server('authorization { user: "worker", password: "s3cr3t" }')
    await assert_refused(server, Settings(user="worker", password="wrong"))
    await run_a_job(
        server, Settings(user="worker", password="s3cr3t", stalled_after=1), tmp_path / "fleet"
    )


async def test_user_and_password_in_the_address(make_server: MakeServer) -> None:
    server = make_server('authorization { user: "worker", password: "s3cr3t" }')
    async with NATSBackend(f"nats://worker:s3cr3t@127.0.0.1:{server.port}") as backend:
        assert await Queue("fleet", backend).add("brief", [1])


async def test_nkey(make_server: MakeServer, tmp_path: Path) -> None:
    nkeys = pytest.importorskip("nkeys")
    seeds = [nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER) for _ in range(2)]
    files = [tmp_path / "right.nk", tmp_path / "wrong.nk"]
    for seed, file in zip(seeds, files, strict=True):
        file.write_bytes(bytes(seed))
    public = nkeys.from_seed(bytearray(seeds[0])).public_key.decode()
    server = make_server(f"authorization {{ users: [ {{ nkey: {public} }} ] }}")
    await assert_refused(server, Settings(nkey_seed=str(files[1])))
    await run_a_job(server, Settings(nkey_seed=str(files[0]), stalled_after=1), tmp_path / "fleet")


# -- TLS


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A directory with a certificate authority, and its certificates for a server and a client."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl program")
    directory = tmp_path / "certificates"
    directory.mkdir()

    def openssl(*arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=30
        )

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(
        "req",
        "-x509",
        *key,
        "-keyout",
        "ca.key",
        "-out",
        "ca.crt",
        "-days",
        "2",
        "-subj",
        "/CN=test authority",
    )
    for name, usage in (("server", "serverAuth"), ("client", "clientAuth")):
        extensions = (
            "basicConstraints=CA:FALSE\nsubjectAltName=IP:127.0.0.1\n"
            f"extendedKeyUsage={usage}\nauthorityKeyIdentifier=keyid\n"
        )
        (directory / f"{name}.ext").write_text(extensions)
        openssl(
            "req",
            "-new",
            *key,
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.csr",
            "-subj",
            f"/CN={name}",
        )
        signing = (
            "-CA",
            "ca.crt",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            f"{name}.ext",
        )
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.crt", *signing)
    return directory


def tls_config(certificates: Path, *, verify: bool) -> str:
    names = {"cert_file": "server.crt", "key_file": "server.key", "ca_file": "ca.crt"}
    lines = "\n".join(f'{key}: "{certificates / name}"' for key, name in names.items())
    return f"tls {{\n{lines}\nverify: {str(verify).lower()}\n}}"


async def test_tls(make_server: MakeServer, certificates: Path, tmp_path: Path) -> None:
    server = make_server(tls_config(certificates, verify=False))
    await assert_refused(server, Settings())  # an authority that this machine does not know
    await run_a_job(
        server, Settings(tls_ca=str(certificates / "ca.crt"), stalled_after=1), tmp_path / "fleet"
    )


async def test_tls_with_a_client_certificate(
    make_server: MakeServer, certificates: Path, tmp_path: Path
) -> None:
    server = make_server(tls_config(certificates, verify=True))
    authority = str(certificates / "ca.crt")
    await assert_refused(server, Settings(tls_ca=authority))
    settings = Settings(
        tls_ca=authority,
        tls_cert=str(certificates / "client.crt"),
        tls_key=str(certificates / "client.key"),
        stalled_after=1,
    )
    await run_a_job(server, settings, tmp_path / "fleet")


# -- what a login needs is not there


@pytest.mark.parametrize(
    ("setting", "variable"),
    [
        ("tls_ca", "ASYNCMQ_NATS_TLS_CA"),
        ("tls_cert", "ASYNCMQ_NATS_TLS_CERT"),
        ("credentials", "ASYNCMQ_NATS_CREDENTIALS"),
        ("nkey_seed", "ASYNCMQ_NATS_NKEY_SEED"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
async def test_a_file_that_is_missing_or_another_is_named(
    setting: str, variable: str, exists: bool, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    if exists:
        path.write_text("something else\n")
    backend = NATSBackend(
        "nats://127.0.0.1:1", settings=Settings.model_validate({setting: str(path)})
    )
    with pytest.raises(
        BackendError, match=f"{variable}.* names '{path}', which cannot be used: "
    ) as raised:
        await backend.connect()
    assert not isinstance(raised.value, ConnectionFailed)  # there is nothing to wait for


async def test_a_missing_key_of_a_certificate_is_named(certificates: Path) -> None:
    settings = Settings(
        tls_cert=str(certificates / "client.crt"), tls_key=str(certificates / "none.key")
    )
    with pytest.raises(
        BackendError,
        match=r"ASYNCMQ_NATS_TLS_KEY names .*none\.key', which cannot be used: No such file",
    ):
        await NATSBackend("nats://127.0.0.1:1", settings=settings).connect()


@pytest.mark.parametrize("option", ["user_credentials", "nkeys_seed", "nkeys_seed_str"])
async def test_a_login_without_the_package_for_it_says_what_to_install(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    login: dict[str, Any] = {option: "some"}
    with pytest.raises(
        BackendError,
        match=rf"{option} needs the package nkeys: pip install 'asyncmq-nats\[nkeys\]'",
    ):
        await NATSBackend("nats://127.0.0.1:1", **login).connect()


def test_the_address_is_known_without_what_a_login_needs() -> None:
    assert (
        NATSBackend("nats://127.0.0.1:1", settings=Settings(tls_ca="/none")).url
        == "nats://127.0.0.1:1"
    )


async def test_credentials_of_an_account(tmp_path: Path) -> None:
    """A file as the account's tools write it, checked here and then read by nats-py."""
    nkeys = pytest.importorskip("nkeys")
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode()
    (tmp_path / "app.creds").write_text(
        f"-----BEGIN NATS USER JWT-----\nabc.def.ghi\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
    settings = Settings(credentials=str(tmp_path / "app.creds"), connect_timeout=0.2)
    with pytest.raises(ConnectionFailed):  # for there is no server
        await NATSBackend("nats://127.0.0.1:1", settings=settings).connect()


# -- prefix


async def test_prefix_keeps_deployments_on_one_server_apart(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    fleets = {
        prefix: Fleet(server.url, tmp_path / prefix, environment={"ASYNCMQ_NATS_PREFIX": prefix})
        for prefix in ("blue", "green")
    }
    try:
        async with (
            NATSBackend(server.url, settings=Settings(prefix="blue")) as blue_backend,
            NATSBackend(server.url, settings=Settings(prefix="green")) as green_backend,
        ):
            blue, green = Queue("fleet", blue_backend), Queue("fleet", green_backend)
            with anyio.fail_after(SOON):
                await fleets["green"].start("green")
                in_blue = await blue.add("last", [0], job_id="same-id")
                assert await green.get_job(in_blue) is None
                in_green = await green.add("last", [0], job_id="same-id")
                assert await green.wait_for(in_green) == "green"
                assert await blue.get_job_state(in_blue) == "waiting"
                await has(blue, 0, "completed")
                await fleets["blue"].start("blue")
                assert await blue.wait_for(in_blue) == "blue"
            await has(green, 1, "completed")
            for name in await blue_backend.list_logs(""):
                assert name.removeprefix("KV_").startswith(("blue_", "green_")), name
    finally:
        for fleet in fleets.values():
            fleet.stop()
