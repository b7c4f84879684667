"""The config of jobs: what is right is read, and all that is wrong is said at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped, unused-ignore]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhaul.cli.main import cli
from backhaul.errors import ConfigurationError, UsageError
from backhaul.formats.config import Config, ConfigError, read_config
from backhaul.formats.config_schema import config_schema
from backhaul.formats.job_settings import OWN, settings_of
from backhaul.jobs.config import card_of, job_of, settings_of_job, shown_settings, warnings_of
from backhaul.model.job import KINDS
from backhaul.model.secret import Secret

pytestmark = pytest.mark.unit

FULL = """
[stores.offsite]
url = "s3://acme/backups"
[notify.ops]
kind = "mail"
host = "smtp.example.com"
from = "backhaul@db7.example.com"
to = "ops@example.com"
[notify.beat]
kind = "healthchecks"
url = { file = "/etc/backhaul/beat" }
[defaults]
notify = "ops"
pings = ["beat"]
retries = 2
window = { timezone = "Europe/Berlin", jitter = "15m", at_end = "finish" }
environment = { PGHOST = "db7" }

[jobs.orders]
kind = "push"
from = "postgresql:///orders"
to = ["offsite:db7/orders", "/mnt/usb/orders"]
require = "any"
compress = "3"
encrypt-to = ["age1x", "age1y"]
limit = "08:00-18:00=5M,40M"
max_age = "26h"
max_drill_age = "1w"
min_size = "50%"
window = { start = "22:00", length = "330m", days = "mon-sat", excluded = ["12-24"] }
environment = { PGPASSWORD = { file = "/etc/backhaul/pg" } }

[jobs.chunks]
kind = "mirror"
directory = "/backups"
to = "offsite:chunks"
recycle_after = "30d"
max_delete = 50
streams = 4
lock = "/run/groom.lock"
window = { start = ["22:00", "04:00"], length = "3h", at_end = "stop-new" }

[jobs.prove]
kind = "drill"
series = "offsite:db7/orders"
check = [["SELECT count(*) FROM t", "3"]]

[jobs.keep]
kind = "prune"
series = ["offsite:db7/orders"]
keep_last = 7
keep_within = "30d"
unproved_ok = true

[jobs.old-script]
kind = "command"
pipeline = [["mysqldump", "app"], ["gzip", "-1"]]
retries = 0
"""


def config(text: str = FULL, *more: str) -> Config:
    return read_config([("one.toml", text), *((f"{n}.toml", each) for n, each in enumerate(more))], "Etc/UTC")


def problems(*texts: str) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        config(*texts)
    return [(problem.key, problem.reason) for problem in caught.value.problems]


def test_a_whole_config() -> None:
    found = config()
    assert list(found.jobs) == ["orders", "chunks", "prove", "keep", "old-script"]
    orders = job_of(found.jobs["orders"])
    assert orders.notify == ("ops",)
    assert orders.retries == 2
    assert orders.environment == {"PGHOST": "db7", "PGPASSWORD": Secret("file", ("/etc/backhaul/pg",))}
    window = orders.card.window
    assert window is not None
    assert (window.starts, window.length, window.days) == ((1320,), 19800, (0, 1, 2, 3, 4, 5))
    assert (window.timezone, window.jitter, window.at_end, window.excluded) == (
        "Europe/Berlin",
        900,
        "finish",
        ("12-24",),
    )
    assert orders.card.expectations.max_age == 26 * 3600
    assert orders.card.expectations.least == 0.5
    assert orders.card.places == ("offsite:db7/orders", "/mnt/usb/orders")
    assert job_of(found.jobs["old-script"]).retries == 0
    # A job without a window of its own is not scheduled, whatever the defaults say of windows.
    assert card_of(found.jobs["prove"]).window is None
    chunks = card_of(found.jobs["chunks"]).window
    assert chunks is not None
    assert (chunks.at_end, chunks.starts) == ("stop-new", (240, 1320))


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (
            "orders",
            "push offsite:db7/orders /mnt/usb/orders --compress 3 --encrypt-to age1x --encrypt-to age1y --require any "
            "--limit 08:00-18:00=5M,40M --from postgresql:///orders",
        ),
        ("chunks", "sync /backups offsite:chunks --streams 4 --recycle-after 30d --max-delete 50"),
        ("prove", "drill offsite:db7/orders --check SELECT count(*) FROM t 3"),
        ("keep", "prune offsite:db7/orders --keep-last 7 --keep-within 30d --unproved-ok"),
    ],
)
def test_what_runs(job: str, words: str) -> None:
    (stage,) = job_of(config().jobs[job]).stages
    assert " ".join(stage[3:]) == words


def test_a_command_and_a_pipeline() -> None:
    assert job_of(config().jobs["old-script"]).stages == (("mysqldump", "app"), ("gzip", "-1"))
    push = config('[jobs.a]\nkind = "push"\nto = "/b"\ncommand = "pg_dump -Fc \'my app\'"\n').jobs["a"]
    assert job_of(push).stages[0][3:] == ("push", "/b", "--", "pg_dump", "-Fc", "my app")


def test_every_option_of_a_job_is_one_of_its_verb() -> None:
    verbs = {"push": "push", "mirror": "sync", "drill": "drill", "prune": "prune"}
    for setting in OWN:
        for kind in setting.kinds:
            if setting.option:
                options = {name for param in cli.commands[verbs[kind]].params for name in param.opts}
                assert setting.option in options, (kind, setting.option)


def test_what_is_wrong_is_said_at_once_with_its_key() -> None:
    found = problems(
        """
[store.x]
url = "/x"
[stores.bad]
url = "s3://b/p"
regoin = "x"
[defaults]
notify = "nobody"
retries = -1
window = { start = "22:00" }
[jobs.a]
kind = "pusj"
[jobs.b]
kind = "push"
from = "postgresql:///b"
command = ["x"]
to = "nowhere:b"
[jobs.c]
kind = "push"
compres = "3"
keep_last = 3
to = 5
[jobs.d]
kind = "command"
command = "a | b"
window = { strat = "22:00", length = "long" }
[jobs.e]
kind = "prune"
series = "/b"
[jobs.all]
kind = "command"
command = ["x"]
[jobs.f]
kind = "command"
command = ["x"]
environment = { PGPASSWORD = "hunter2" }
window = { start = "25:00" }
[jobs.g]
kind = "command"
command = ["x"]
window = { length = "1h", jitter = "2h", timezone = "Mars/Base" }
"""
    )
    keys = [key for key, _ in found]
    text = "\n".join(f"{key}: {reason}" for key, reason in found)
    for expected in (
        "store",
        "stores.bad",
        "defaults.retries",
        "defaults.window.start",
        "jobs.a.kind",
        "jobs.b.command",
        "jobs.b.to",
        "jobs.c.compres",
        "jobs.c.keep_last",
        "jobs.c.to",
        "jobs.d.command",
        "jobs.d.window",
        "jobs.e",
        "jobs.all",
        "jobs.f.environment",
        "jobs.f.window",
        "jobs.g.window",
    ):
        assert expected in keys, expected
    for words in (
        "did you mean stores",
        "did you mean region",
        "did you mean push",
        "did you mean compress",
        "a prune job has it",
        "did you mean start",
        "25:00",
    ):
        assert words in text, words
    assert "hunter2" not in text


def test_receivers_of_a_push() -> None:
    """They are no place that records or backups are looked for in."""
    text = """
[jobs.nightly]
kind = "push"
to = ["/backups/orders", "send:db2,db3?require=1"]
command = ["pg_dump", "orders"]
"""
    settings = config(text).jobs["nightly"]
    assert card_of(settings).places == ("/backups/orders",)
    (stage,) = job_of(settings).stages
    assert "send:db2,db3?require=1" in stage
    wrong = """
[jobs.mirror]
kind = "mirror"
directory = "/x"
to = "send:db2"
[jobs.twice]
kind = "push"
to = "send:db2,db2"
command = ["x"]
[jobs.unknown]
kind = "push"
to = "send:db2?requir=1"
command = ["x"]
"""
    found = dict(problems(wrong))
    assert set(found) == {"jobs.mirror.to", "jobs.twice.to", "jobs.unknown.to"}
    assert "did you mean require" in found["jobs.unknown.to"]


def test_several_files_and_where_things_come_from() -> None:
    found = config(FULL, '[jobs.orders]\nkind = "command"\ncommand = ["x"]\n[defaults]\nretries = 5\n')
    assert found.jobs["orders"].kind == "command"
    assert job_of(found.jobs["prove"]).retries == 5
    assert found.jobs["prove"].origins["retries"] == "0.toml [defaults]"
    assert found.jobs["prove"].origins["series"] == "one.toml [jobs.prove]"
    with pytest.raises(ConfigError) as caught:
        config(FULL, "[jobs.x]\nkind = 3\n", "not toml")
    assert {problem.file for problem in caught.value.problems} == {"0.toml", "1.toml"}


def test_a_job_that_is_not_there() -> None:
    with pytest.raises(UsageError) as caught:
        settings_of_job(config(), "order")
    assert "did you mean orders" in caught.value.why


def test_show_can_be_read_again() -> None:
    found = config()
    text = "\n".join(
        f"[jobs.{name}]\n" + "\n".join(f"{key} = {value}" for key, (value, _) in shown_settings(job).items())
        for name, job in found.jobs.items()
    )
    stores_and_channels = FULL.partition("[defaults]")[0]
    again = config(stores_and_channels + text)
    for name, job in found.jobs.items():
        assert job_of(again.jobs[name]) == job_of(job)


def test_warnings(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o644)
    text = (
        '[notify.ops]\nkind = "command"\ncommand = ["true"]\n[jobs.a]\nkind = "command"\ncommand = ["x"]\npings = "ops"\n'
        f'environment = {{ T = {{ file = "{secret}" }} }}\n'
    )
    found = "\n".join(warnings_of(config(text)))
    assert "nobody hears of it" in found
    assert "no channel of pings" in found
    assert str(secret) in found


def test_the_schema_takes_what_is_right_and_refuses_what_is_wrong() -> None:
    import tomllib

    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(tomllib.loads(FULL))
    wrongs: tuple[dict[str, Any], ...] = (
        {"store": {}},
        {"jobs": {"a": {"kind": "pusj"}}},
        {"jobs": {"a": {"kind": "push", "compres": "1"}}},
        {"jobs": {"a": {"kind": "command", "retries": "2"}}},
        {"jobs": {"a": {"kind": "command", "window": {"strat": "22:00"}}}},
        {"jobs": {"a b": {"kind": "command"}}},
        {"notify": {"a": {"kind": "pigeon"}}},
    )
    for wrong in wrongs:
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(wrong)


def test_each_kind_has_its_settings() -> None:
    for kind in KINDS:
        assert "window" in settings_of(kind)
    assert "directory" not in settings_of("push")
    assert "kind" not in settings_of("")


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.text(max_size=8)
    | st.sampled_from(["22:00", "1h", "50%", "/b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(KINDS), st.data())
def test_no_value_is_a_fault(kind: str, data: st.DataObject) -> None:
    keys = sorted(settings_of(kind))
    table = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, max_size=4))
    text = f'[jobs.a]\nkind = "{kind}"\n' + "".join(f"{key} = {toml(value)}\n" for key, value in table.items())
    try:
        config(text)
    except ConfigurationError as error:
        assert isinstance(error, ConfigError)
        assert error.problems


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    return "1979-05-27" if value is None else json.dumps(value).replace("\\u007f", "")
