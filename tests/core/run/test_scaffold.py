"""make new: what it writes is an app that passes its own check; a bad name is refused."""

import shutil
from dataclasses import replace

import pytest

from core import app as apps
from core import config as configs
from core.batch import Batch
from core.run.evaluate import Judge
from core.run.scaffold import write_app


@pytest.fixture
def fresh():
    name = "scaffold_under_test"
    write_app(name)
    yield name
    shutil.rmtree(apps.folder(name))


def test_a_new_app_passes_its_self_check_as_it_stands(fresh, tmp_path):
    app = apps.find(fresh)
    app.write_offline(tmp_path / "data", 0)
    rows = apps.prepare(app, app.load(tmp_path / "data")["test"], app.options())
    config = configs.load(app, apps.folder(fresh) / "tiny.yaml", ["rewards.workers=1"])
    assert Batch.of(configs.load(app, apps.folder(fresh) / "gpu.yaml")).rollouts == 256
    with Judge(app, config, app.composite()) as judge:
        found = apps.self_check(app, rows, judge.rewards, judge.metrics)
        assert found
        assert all(finding.ok for finding in found)
        broken = replace(app, gold=lambda row: " " + " ".join(row["word"] + "x"))
        assert not any(finding.ok for finding in apps.self_check(broken, rows, judge.rewards, judge.metrics))


@pytest.mark.parametrize(("name", "said"), [("My-App", "is not a name for an app"), ("text_to_sql", "exists already")])
def test_a_name_that_will_not_do_is_refused(name, said):
    with pytest.raises(apps.AppError, match=said):
        write_app(name)
