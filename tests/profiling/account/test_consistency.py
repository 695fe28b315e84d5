"""An account that can be wrong: records that contradict each other, and figures that cannot be."""

import json
import os
import random
import shutil
from pathlib import Path

import plotly.offline
import pytest
from made_run import ACTIVE, BATCH, MS, STEP_NS, STEPS, TRAINING_NS, S, change, make_run, make_trace, sampled

from profiling.output import errors, terminal
from profiling.output.files import read_json, write_json
from profiling.report import build, command
from profiling.report.html import render_html
from profiling.report.markdown import render_markdown


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run whose account is complete."""
    return sampled(make_run(tmp_path_factory.mktemp("base") / "run"), 1464)


def test_the_account_of_an_honest_run_is_complete(base):
    made = build.build(base)
    assert (made["doubts"], made["lacks"], made["status"]) == ([], [], "complete")
    command.run(base, True, terminal.Terminal(speaks=False))


def record(name, **entries):
    return lambda run: change(run / "records" / f"{name}.json", **entries)


def starts(step_ns):
    return [[S + i * step_ns for i in range(STEPS + 1)]]


def passes(factor, step_ns):
    """The kernels of the profiled pass are `factor` times as long as they were, its steps `step_ns` long."""

    def damage(run):
        make_trace(run / "records" / "trace.json.gz", factor)
        record("profile", step_ns=[step_ns] * ACTIVE)(run)

    return damage


def phases_overlap(run):
    phases = read_json(run / "records" / "phases.json")["phases"]
    phases[2]["start_ns"] -= S // 10
    record("phases", phases=phases)(run)


def ceiling_too_low(key):
    def damage(run):
        found = read_json(run / "records" / "ceilings.json")[key]
        for ceiling in found if isinstance(found, list) else [found]:
            ceiling["value"] *= 1e-3
        record("ceilings", **{key: found})(run)

    return damage


DAMAGES = {
    "kernels longer than the steps": (passes(1.5, 25 * MS), "Idle is -0.1 s, -5.0% of training"),
    "ten times the images in the pass": (
        record("profile", step_images=[10 * BATCH] * ACTIVE),
        "steps of 5,120 images, and a batch of 512",
    ),
    "a tenth of the images in the pass": (
        record("profile", step_images=[BATCH // 10] * ACTIVE),
        "steps of 51 images, and a batch of 512",
    ),
    "half of the trace's steps counted": (
        record("profile", step_images=[BATCH] * 10, step_ns=[21 * MS] * 10),
        "10 counts and 10 times of steps, 20 steps in the trace",
    ),
    "no images": (record("work", images=0), "images is 0, expected a whole number from 1"),
    "images of another run": (
        record("work", images=STEPS * BATCH * 10),
        "512,000 images, and 100 steps of at most 512",
    ),
    "another batch": (
        lambda run: change(run / "config.json", batch_size=128),
        "a batch of 512 images, 128 in config.json",
    ),
    "work lost": (lambda run: (run / "records/work.json").unlink(), "There is no count of the work"),
    "FLOPs of another network": (record("work", flops_per_image=10**9), "FLOPs a step, and its operations have"),
    "half of the steps": (record("steps", epochs=[starts(STEP_NS)[0][: STEPS // 2 + 1]]), "50 steps, 100 in summary"),
    "steps missed": (record("steps", missed_steps=50), "50 steps were missed"),
    "steps longer than training": (record("steps", epochs=starts(2 * STEP_NS)), "4 s of steps in 2.02 s of training"),
    "steps that go back": (record("steps", epochs=[[S, 0] * (STEPS // 2) + [S]]), "ends before it begins"),
    "phases overlap": (phases_overlap, "not contiguous"),
    "a summary of another run": (lambda run: change(run / "summary.json", train_s=4.0), "4 s in summary.json"),
    "epochs lost": (lambda run: change(run / "summary.json", epochs=3), "Epochs: 2 in log.jsonl, 3 in summary.json"),
    "idle that the trace does not have": (passes(0.5, 30 * MS), "by the gaps between kernels in the trace"),
    "a pass faster than the run": (record("profile", step_ns=[16 * MS] * ACTIVE), "something else used this machine"),
    "a computing ceiling too low": (ceiling_too_low("gemm"), "the ceiling is too low"),
    "a bandwidth too low": (ceiling_too_low("copy"), "the ceiling is too low"),
    "a tenth of training outside of steps": (
        record("steps", epochs=starts(STEP_NS - 2 * MS)),
        "10.9% of training is unexplained",
    ),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_contradiction_is_said_and_fails_strict(base, tmp_path, damage, said):
    run = Path(shutil.copytree(base, tmp_path / "run"))
    damage(run)
    made = build.build(run)
    assert any(said in line for line in (*made["doubts"], *made["lacks"])), (made["doubts"], made["lacks"])
    assert made["status"] == "incomplete"
    total = sum(t["ns"] for t in made["terms"])
    assert total in (TRAINING_NS, 4 * S)  # whatever is wrong, the terms are all of the phase
    with pytest.raises(errors.InconsistentError):
        command.run(run, True, terminal.Terminal(speaks=False))


def test_strict_wants_a_small_residual_of_a_complete_account_too(base, tmp_path):
    run = Path(shutil.copytree(base, tmp_path / "run"))
    record("steps", epochs=starts(STEP_NS - MS // 2))(run)
    assert build.build(run)["status"] == "complete"
    with pytest.raises(errors.InconsistentError, match=r"leaves 3\.5% of training unexplained, expected at most 2%"):
        command.run(run, True, terminal.Terminal(speaks=False))


WRONG = (None, True, -1, 0.5, 10**30, 1e300, "text", [], {}, [None], [[]], {"a": 1})
MAY_BE_NULL = {"data_source", "step", "seed", "git_sha", "test_accuracy", "train_plus_eval_s", "wall_s", "images_per_s"}
MAY_BE_NULL |= {"peak_memory_bytes", "reference", "fused", "article", "sm_clock_mhz", "reasons", "power_capped_share"}
MAY_BE_NULL |= {"eager_step", "error"}
ANY_NUMBER = {"seed", "images_per_s"}
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
    """Put something of another type into the document, or take something out of it; the fault in words."""
    # of a machine nothing enters the account but whether it has a GPU
    path = ("gpu",) if "gpu" in document else rng.choice(sorted(places(document), key=str))
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    before, last = owner[path[-1]], path[-1]
    allowed = [w for w in WRONG if type(w) is not type(before) and not (w is None and last in MAY_BE_NULL)]
    if isinstance(before, int | float):  # a number may be another one, unless it is none of its kind
        allowed = [w for w in allowed if not isinstance(w, int | float) or isinstance(w, bool)]
        allowed += [] if last in ANY_NUMBER else [-1, 10**30, 1e300]
    if before is None:
        allowed = ["text", [], {}]
    if path == ("gpu",):
        allowed = ["text", True, [], 5, None]
    if isinstance(last, str) and last not in MAY_BE_NULL and rng.random() < 0.2:
        del owner[last]
        return f"without {path}"
    owner[last] = rng.choice(allowed)
    return f"{owner[last]!r} at {path}"


def damaged(rng, data: bytes, path: Path) -> str:
    """Write `data` to `path` with a fault in it; the fault in words."""
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
        write_json(path, document)
        return said
    if kind == "cut":
        path.write_bytes(data[:at])
    else:
        at = max(at, 10)  # what a gzip file's head says is not read
        inside = data[:at].count(b'"') % 2  # of a text, where a bracket is none
        junk = rng.choice([b"\xff\xff", b"\0" * 9, b"}]", b"[" * 5000][: 2 if inside else 4])
        path.write_bytes(data[:at] + junk + data[at + 2 :])
        kind = f"{junk[:2]} for {data[at - 30 : at + 2]}"
    return f"{kind} at {at}"


@pytest.mark.parametrize("count", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_no_damaged_run_has_a_complete_account(tmp_path, monkeypatch, count):
    """Faults by a seed: whatever is in the files, a report is made, and says that it lacks something."""
    monkeypatch.setattr(plotly.offline, "get_plotlyjs", lambda: "")
    base = sampled(make_run(tmp_path / "base", active=6), 1464, count=24)
    run = Path(shutil.copytree(base, tmp_path / "run"))
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
