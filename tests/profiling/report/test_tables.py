import pytest
from report_sample import MADE_UP, cpu, empty, figure, gpu, hostile

from profiling.output.units import MISSING
from profiling.report import tables
from profiling.report.timeline import telemetry_table

MINUS = "\N{MINUS SIGN}"
TABLES = [
    tables.phases,
    tables.terms,
    tables.article,
    tables.kernels,
    lambda report: tables.kernels(report, "layers"),
    tables.roofs,
    tables.floors,
    tables.levers,
    tables.epochs,
    telemetry_table,
]


def cells(row):
    return [cell.text for cell in row.cells]


@pytest.mark.parametrize("make", [gpu, cpu, empty, hostile], ids=lambda make: make.__name__)
def test_tables_are_rectangular_whatever_is_missing(make):
    report = make()
    for table in [make_table(report) for make_table in TABLES]:
        for row in [*table.rows, *filter(None, [table.total])]:
            assert len(row.cells) == len(table.columns)
            if make is empty:  # nothing known is never a zero
                assert not [text for text in cells(row) if text.startswith("0")], cells(row)
                assert row.status in ("unavailable", "measured" if table.columns[0] == "epoch" else "unavailable")
        assert max(table.texts, default=-1) < len(table.columns)
    tables.tiles(report), tables.lacks(report), tables.environment(report), tables.unplaced(report)


def test_terms_are_sorted_by_what_can_be_recovered_and_parts_stay_with_their_term():
    table = tables.terms(gpu())
    names = [row.cells[0].text for row in table.rows]
    assert names[:2] == ["convolutions below their roof", "batch norm and fused epilogues"]
    assert names.index("launching kernels") == names.index("idle") + 1
    assert [row.child for row in table.rows][names.index("idle") :][:5] == [False, True, True, True, False]
    gains = [float(row.cells[3].text) for row in table.rows if row.cells[3].text]
    assert gains == sorted(gains, reverse=True)


def test_terms_are_summed_with_their_sign():
    table = tables.terms(gpu())
    assert cells(table.total)[:2] == ["training", "9.732"]
    row = next(row for row in table.rows if row.cells[0].text == "layout and casts")
    assert cells(row)[1:3] == [f"{MINUS}0.014", f"{MINUS}0.1"]
    assert row.cells[2].bar is None


def test_phases_sum_to_the_process():
    table = tables.phases(gpu())
    assert cells(table.total)[:2] == ["process", "31.43"]
    assert sum(row.cells[2].bar for row in table.rows) == pytest.approx(1)


def test_kernels_are_sorted_by_time_and_carry_their_provenance():
    table = tables.kernels(gpu())
    times = [float(row.cells[1].text) for row in table.rows]
    assert times == sorted(times, reverse=True)
    assert table.rows[0].provenance == f"measured: trace of 20 steps ({MADE_UP})"
    assert table.rows[1].cells[0].under == "cifar::conv_dgrad · 512x32x32x64 * 64x3x3x64"
    assert table.rows[0].cells[2].bar == 1
    pool = next(row for row in table.rows if row.cells[0].text == "max_pool_backward_nhwc")
    assert [pool.cells[i].text for i in (4, 6, 7)] == [MISSING] * 3

    under = tables.kernels(gpu()).rows[0].cells[0].under.replace("\xa0", " ")
    assert under.endswith("210 MB of DRAM counted · tensor cores 62.0 % active")
    assert tables.details({"name": "aten::add", "op": "aten::add", "shape": "2x3"}) == "2x3", "no name twice"


def test_a_report_of_thousands_of_kernels_stays_small():
    report = gpu()
    report["kernels"] *= 100
    table = tables.kernels(report)
    assert len(table.rows) == tables.MOST
    assert len(table.rows) + table.omitted == len(report["kernels"])
    assert tables.kernels(gpu()).omitted == 0


def test_levers_multiply_and_their_logarithms_add_up():
    total = cells(tables.levers(gpu()).total)
    assert total[1:] == ["26.3", "3.27"]
    given = {"name": "n", "status": "modelled", "source": "s"}
    report = {"levers": [given | {"factor": 1683.2, "log": 7.43}, given | {"factor": 0.00387, "log": -5.55}]}
    assert [cells(row)[1] for row in tables.levers(report).rows] == ["1,683", "0.00387"], "each to its own digits"


def test_the_environment_says_each_thing_once():
    report = {"run": {"git_sha": "a", "device": "GPU", "dirty": True}}
    report["environment"] = {"version": 1, "git_sha": "a", "device": "cuda", "git_dirty": True, "packages torch": "2"}
    assert tables.environment(report) == [("git sha", "a"), ("device", "GPU"), ("dirty", "yes"), ("torch", "2")]


def test_a_bar_above_its_roof_looks_different():
    report = gpu()
    report["kernels"][0]["roof_fraction"], report["kernels"][1]["roof_fraction"] = 6.0, 0.9
    first, second = (row.cells[7] for row in tables.kernels(report).rows[:2])
    assert ((first.text, first.bar, first.over), (second.bar, second.over)) == (("600.0", 1.0, True), (0.9, False))


def test_how_much_of_the_time_the_roofline_does_not_show():
    report = gpu()
    out = [row for row in report["kernels"] if row["intensity"] is None]
    share = sum(row["share"] for row in out)
    assert tables.unplaced(report) == (
        f"Not shown are {len(out)} of {len(report['kernels'])} kernels, {100 * share:.3g}\xa0% of the time: copies and "
        "casts, which do no arithmetic, and kernels whose bytes or FLOPs are not known."
    )
    assert tables.unplaced(report | {"kernels": [row for row in report["kernels"] if row["intensity"]]}) == ""


def test_an_accuracy_keeps_four_digits():
    tile = next(tile for tile in tables.tiles(gpu()) if tile.label == "test accuracy")
    assert (tile.number, tile.unit, tile.exact) == ("94.07", "%", "0.9407 share")


def test_what_is_unavailable_has_its_reason_and_is_lacking():
    report = {"figures": {"mfu": figure(None, "share", "", "unknown GPU", "MFU")}, "doubts": [], "lacks": ["no trace"]}
    (tile,) = tables.tiles(report)
    assert (tile.number, tile.status, tile.source) == (MISSING, "unavailable", "unknown GPU")
    assert tables.lacks(report) == ["no trace", "MFU: unknown GPU"]
