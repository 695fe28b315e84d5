"""An account that can be wrong: records that contradict each other, and figures that cannot be."""

import json
import os
import random
from pathlib import Path

import made_run
import plotly.offline
import pytest
from made_run import ACTIVE, BATCH, MS, STEP_NS, STEPS, S, make_run, sampled

from profiling.output import errors, terminal
from profiling.output.files import read_json, write_json
from profiling.report import build, command
from profiling.report.html import render_html
from profiling.report.markdown import render_markdown


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run whose account is complete."""
    return sampled(make_run(tmp_path_factory.mktemp("base") / "run"), 1464)


@pytest.fixture
def run(base, tmp_path) -> Path:
    """A copy of its files, to be damaged."""
    for path in filter(Path.is_file, base.rglob("*")):
        target = tmp_path / "run" / path.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path / "run"


def change(path: Path, **entries) -> None:
    write_json(path, read_json(path) | entries)


def test_the_account_of_an_honest_run_is_complete(base):
    made = build.build(base)
    assert (made["doubts"], made["lacks"], made["status"]) == ([], [], "complete")
    command.run(base, True, terminal.Terminal(speaks=False))


def of_another_length(folder, factor):
    """The kernels of the profiled pass, `factor` times as long as they were."""
    trace = make_run(folder.parent / "other", round(factor * STEP_NS)) / "records" / "trace.json.gz"
    made_run.make_trace(trace, factor)
    (folder / "records" / "trace.json.gz").write_bytes(trace.read_bytes())


def phases_overlap(folder):
    phases = read_json(folder / "records" / "phases.json")
    phases["phases"][2]["start_ns"] -= S // 10
    write_json(folder / "records" / "phases.json", phases)


def other_ceiling(folder, key, factor):
    record = read_json(folder / "records" / "ceilings.json")
    for ceiling in record[key] if isinstance(record[key], list) else [record[key]]:
        ceiling["value"] *= factor
    write_json(folder / "records" / "ceilings.json", record)


def few_steps(record, n=STEPS // 2):
    return [record["epochs"][0][: n + 1]]


RECORDS = {
    "kernels longer than the steps": (
        lambda f: of_another_length(f, 1.5) or change(f / "records/profile.json", step_ns=[25 * MS] * ACTIVE),
        "Idle is -0.1 s, -5.0% of training",
    ),
    "ten times the images in the pass": (
        lambda f: change(f / "records/profile.json", step_images=[10 * BATCH] * ACTIVE),
        "steps of 5,120 images, and a batch of 512",
    ),
    "a tenth of the images in the pass": (
        lambda f: change(f / "records/profile.json", step_images=[BATCH // 10] * ACTIVE),
        "steps of 51 images, and a batch of 512",
    ),
    "half of the trace's steps counted": (
        lambda f: change(f / "records/profile.json", step_images=[BATCH] * 10, step_ns=[21 * MS] * 10),
        "10 counts and 10 times of steps, 20 steps in the trace",
    ),
    "no images": (lambda f: change(f / "records/work.json", images=0), "images is 0, expected a whole number from 1"),
    "images of another run": (
        lambda f: change(f / "records/work.json", images=STEPS * BATCH * 10),
        "512,000 images, and 100 steps of at most 512",
    ),
    "another batch": (lambda f: change(f / "config.json", batch_size=128), "a batch of 512 images, 128 in config.json"),
    "work lost": (lambda f: (f / "records/work.json").unlink(), "There is no count of the work"),
    "FLOPs of another network": (
        lambda f: change(f / "records/work.json", flops_per_image=10**9),
        "FLOPs a step, and its operations have",
    ),
    "half of the steps": (
        lambda f: change(f / "records/steps.json", epochs=few_steps(read_json(f / "records/steps.json"))),
        "50 steps, 100 in summary.json",
    ),
    "steps missed": (lambda f: change(f / "records/steps.json", missed_steps=50), "50 steps were missed"),
    "steps longer than training": (
        lambda f: change(f / "records/steps.json", epochs=[[i * 2 * STEP_NS for i in range(STEPS + 1)]]),
        "4 s of steps in 2.02 s of training",
    ),
    "steps that go back": (
        lambda f: change(f / "records/steps.json", epochs=[[(i % 2) * STEP_NS for i in range(STEPS + 1)]]),
        "ends before it begins",
    ),
    "phases overlap": (phases_overlap, "not contiguous"),
    "a summary of another run": (lambda f: change(f / "summary.json", train_s=4.0), "4 s in summary.json"),
    "idle that the trace does not have": (
        lambda f: of_another_length(f, 0.5) or change(f / "records/profile.json", step_ns=[30 * MS] * ACTIVE),
        "by the gaps between kernels in the trace",
    ),
    "a pass faster than the run": (
        lambda f: change(f / "records/profile.json", step_ns=[16 * MS] * ACTIVE),
        "something else used this machine",
    ),
    "a computing ceiling too low": (lambda f: other_ceiling(f, "gemm", 1e-3), "the ceiling is too low"),
    "a bandwidth too low": (lambda f: other_ceiling(f, "copy", 1e-3), "the ceiling is too low"),
    "a tenth of training outside of steps": (
        lambda f: change(f / "records/steps.json", epochs=[[S + i * (STEP_NS - 2 * MS) for i in range(STEPS + 1)]]),
        "10.9% of training is unexplained",
    ),
}


@pytest.mark.parametrize(("damage", "said"), RECORDS.values(), ids=RECORDS)
def test_what_does_not_add_up_is_said_and_fails_strict(run, damage, said):
    damage(run)
    made = build.build(run)
    assert any(said in line for line in (*made["doubts"], *made["lacks"])), (made["doubts"], made["lacks"])
    assert made["status"] == "incomplete"
    total = sum(t["ns"] for t in made["terms"])
    assert total in (made_run.TRAINING_NS, 4 * S)  # whatever is wrong, the terms are all of the phase
    with pytest.raises(errors.InconsistentError):
        command.run(run, True, terminal.Terminal(speaks=False))


WRONG = (None, True, -1, 0.5, 10**30, 1e300, "text", [], {}, [None], [[]], {"a": 1})
MAY_BE_NULL = {"data_source", "step", "seed", "git_sha", "test_accuracy", "train_plus_eval_s", "wall_s", "images_per_s"}
MAY_BE_NULL |= {"peak_memory_bytes", "reference", "fused", "article", "sm_clock_mhz", "reasons", "power_capped_share"}
MAY_BE_NULL |= {"eager_step", "error"}
UNREAD = {"source", "environment"}
"""Entries of which a report asks nothing."""


def places(value, path=()):
    """Paths to what a report reads in a document; of a long list, to some of its items."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value.keys() - UNREAD:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in {0, len(value) // 2, len(value) - 1} if value else ():
            yield from places(value[i], (*path, i))


def of_another_type(rng, document):
    """The document with something in it that is of another type, or gone."""
    # of a machine nothing enters the account but whether it has a GPU
    path = ("gpu",) if "gpu" in document else rng.choice(sorted(places(document), key=str))
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    before = owner[path[-1]]
    allowed = [w for w in WRONG if type(w) is not type(before) and not (w is None and path[-1] in MAY_BE_NULL)]
    if isinstance(before, int | float):  # a number may be another one, unless it is none of its kind
        allowed = [w for w in allowed if not isinstance(w, int | float) or isinstance(w, bool)] + [-1, 10**30, 1e300]
    if before is None:
        allowed = ["text", [], {}]
    if path == ("gpu",):
        allowed = ["text", True, [], 5, None]
    if isinstance(path[-1], str) and path[-1] not in MAY_BE_NULL and rng.random() < 0.2:
        del owner[path[-1]]
        return f"without {path}"
    owner[path[-1]] = rng.choice(allowed)
    return f"{owner[path[-1]]!r} at {path}"


def damaged(rng, data: bytes, path: Path) -> str:
    """Write `data` to `path` with a fault in it, which the name of the fault is returned of."""
    kind = rng.choice(["type", "type", "type", "type", "cut", "garbage", "gone", "no file"])
    if kind == "gone":
        return kind
    if kind == "no file":
        made = rng.choice(["folder", "pipe", "device", "dangling"])
        if made == "folder":
            path.mkdir()
        elif made == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero" if made == "device" else "nowhere")
        return made
    at = rng.randrange(1, len(data) - 2)
    if kind == "type" and path.suffix == ".json":
        document = json.loads(data)
        said = of_another_type(rng, document)
        path.write_text(json.dumps(document))
        return said
    if kind == "cut":
        path.write_bytes(data[:at])
    else:
        at = max(at, 10)  # what a gzip file's head says is not read
        junk = rng.choice([b"\xff\xff", b"\0" * 9, b"}]", b"[" * 5000])
        path.write_bytes(data[:at] + junk + data[at + 2 :])
        kind = f"{junk[:2]} for {data[at - 30 : at + 2]}"
    return f"{kind} at {at}"


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_no_damaged_run_has_a_complete_account(tmp_path, monkeypatch, count):
    """Faults by a seed: whatever is in the files, a report is made, and says that it lacks something."""
    monkeypatch.setattr(plotly.offline, "get_plotlyjs", lambda: "")
    base, run = (sampled(make_run(tmp_path / name, active=6), 1464, count=24) for name in ("base", "run"))
    rng, names = random.Random(14), sorted(p.relative_to(base) for p in base.rglob("*") if p.is_file())
    assert build.build(run)["status"] == "complete"
    refused, wrong = 0, []
    for number in range(count):
        name = rng.choice(names)
        path, data = run / name, (base / name).read_bytes()
        path.unlink()
        what = f"{number}: {name}, {damaged(rng, data, path)}"
        try:
            made = build.build(run)
            if made["status"] != "incomplete":
                wrong.append(what)
            if number % 5 == 0:
                render_html(made)
                render_markdown(made)
        except errors.ReportError:
            refused += name.name == "summary.json"
        except Exception as error:
            wrong.append(f"{what}: {error!r}")
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(data)
    assert not wrong
    assert refused > count // 50
