import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae_core.activations import ActivationError, harvest, parallel
from sae_core.activations.harvest import Plan, Pool
from sae_core.activations.parallel import devices, on_ray, processes
from sae_core.study import ActivationSettings, ModelSettings

Contents = Callable[[Path], dict[str, bytes]]


def test_several_processes_write_the_bytes_that_one_writes_and_go_on_where_it_stopped(
    site: ActivationSettings, model: ModelSettings, corpus: Path, made: Path, contents: Contents, tmp_path: Path
):
    there = tmp_path / "train-00004.safetensors"
    there.write_bytes((made / there.name).read_bytes())
    before, told = there.stat().st_mtime_ns, []
    pool = processes(["cpu", "cpu"])
    harvest(site, model, corpus, tmp_path, report=lambda done, total, *_, **__: told.append((done, total)), pool=pool)
    assert contents(tmp_path) == contents(made)
    assert there.stat().st_mtime_ns == before
    assert told == sorted(told)
    assert told[-1] == (1660, 1660)


def test_a_process_that_is_killed_ends_the_harvest_with_what_to_do(
    site: ActivationSettings, model: ModelSettings, corpus: Path, made: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    (tmp_path / "train-00000.safetensors").write_bytes((made / "train-00000.safetensors").read_bytes())
    monkeypatch.setattr(parallel, "_start", os.abort)  # which takes no arguments, so that the process ends at once
    with pytest.raises(ActivationError, match="give fewer workers"):
        harvest(site, model, corpus, tmp_path, pool=processes(["cpu"]))
    assert [path.name for path in tmp_path.glob("*-*.safetensors")] == ["train-00000.safetensors"]


@pytest.mark.parametrize("pool", [None, processes(["cpu"])], ids=["here", "process"])
def test_sites_that_are_read_in_one_pass_have_the_bytes_of_each_read_alone(
    pool: Pool | None, site: ActivationSettings, model: ModelSettings, corpus: Path, made: Path, contents: Contents,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """One shallower and one deeper; what was begun of one goes on; afterwards there is nothing left to run."""
    others = [Plan(site.at(*where), model, corpus, tmp_path / where[0]) for where in (("mlp_in", 0), ("mlp_out", 2))]
    (tmp_path / "mlp_in").mkdir()
    harvest(site, model, corpus, tmp_path / "main", pool=pool, others=others)
    assert contents(tmp_path / "main") == contents(made)
    for other in others:
        made_at = {path: path.stat().st_mtime_ns for path in other.folder.glob("*-*.safetensors")}
        harvest(other.settings, model, corpus, other.folder)
        assert {path: path.stat().st_mtime_ns for path in other.folder.glob("*-*.safetensors")} == made_at
        alone = tmp_path / "alone" / other.settings.hook
        alone.mkdir(parents=True)
        harvest(other.settings, model, corpus, alone)
        assert contents(other.folder) == contents(alone)


def test_workers_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices("cuda", 0) == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices("cuda", 4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert devices("cuda:1", 2) == ["cuda:1", "cuda:1"]
    assert devices("cpu", 0) == ["cpu"]


@pytest.mark.ray
def test_a_ray_cluster_of_two_workers_writes_the_bytes_that_one_process_writes(
    site: ActivationSettings, model: ModelSettings, corpus: Path, made: Path, contents: Contents, tmp_path: Path
):
    pytest.importorskip("ray", reason="needs the extra `ray`")
    pytest.importorskip("dagster_ray", reason="needs the extra `ray`")
    import dagster as dg

    from assets.cluster import Cluster

    options = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False}
    with Cluster(address="local", ray_init_options=options).yield_for_execution(dg.build_init_resource_context()):
        harvest(site, model, corpus, tmp_path, pool=on_ray(2, "cpu"))
    assert contents(tmp_path) == contents(made)
