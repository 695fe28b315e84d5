import pytest

from profiling.account.run_folder import EPOCH
from profiling.output.numbers import unavailable
from profiling.output.units import MISSING
from profiling.report import tables
from profiling.report.timeline import telemetry_table

MINUS = "\N{MINUS SIGN}"
TABLES = {
    "phases": tables.phases,
    "terms": tables.terms,
    "article": tables.article,
    "kernels": tables.kernels,
    "layers": lambda report: tables.kernels(report, "layers"),
    "roofs": tables.roofs,
    "floors": tables.floors,
    "levers": tables.levers,
    "epochs": tables.epochs,
    "telemetry": telemetry_table,
}


def cells(row):
    return [cell.text.replace("\xa0", " ") for cell in row.cells]


def row(table, name):
    return next(row for row in table.rows if row.cells[0].text == name)


def test_tables_are_rectangular_and_rows_say_how_their_numbers_are_known(whole, bare):
    statuses = {"measured", "modelled", "quoted", "unavailable"}
    for report in (whole, bare):
        made = {name: make(report) for name, make in TABLES.items()}
        for table in made.values():
            for line in [*table.rows, *filter(None, [table.total])]:
                assert len(line.cells) == len(table.columns)
                assert line.status in statuses
                assert line.source
            assert max(table.texts, default=-1) < max(len(table.columns), 1)
        assert [name for name, table in made.items() if not table.rows] == (
            [] if report is whole else [name for name in TABLES if name != "terms"]
        )


def test_terms_are_sorted_by_what_can_be_recovered_and_parts_stay_with_their_term(whole):
    whole["terms"][0]["ns"] += 10**9  # the ideal, the longest term, of which nothing can be recovered
    whole["terms"][5] |= {"ns": -whole["terms"][5]["ns"], "recoverable_ns": 0}  # the casts
    table = tables.terms(whole)
    names = [line.cells[0].text for line in table.rows]
    assert names[:5] == ["convolutions below their roof", "idle", "launching kernels", "in Python", "batch norm"]
    assert [line.child for line in table.rows[:5]] == [False, False, True, True, False]
    assert cells(table.rows[0])[1:4] == ["0.794", "28.2", "0.794"]
    assert cells(row(table, "layout and casts"))[1:4] == [f"{MINUS}0.100", f"{MINUS}3.5", ""]
    assert row(table, "layout and casts").cells[2].bar is None
    gains = [float(line.cells[3].text) for line in table.rows if line.cells[3].text]
    assert gains == sorted(gains, reverse=True)
    assert cells(table.total) == ["training", "2.820", "", "", ""]


def test_phases_sum_to_the_process(whole):
    table = tables.phases(whole)
    assert cells(table.total) == ["process", "4.000", ""]
    assert sum(line.cells[2].bar for line in table.rows) == pytest.approx(1)
    assert cells(tables.phases(whole | {"phases": [whole["phases"][0] | {"ns": 0}]}).rows[0])[2] == MISSING


def test_kernels_are_sorted_by_time_and_carry_their_provenance(whole):
    whole["kernels"].reverse()
    whole["kernels"][0]["roof_fraction"], whole["kernels"][1]["roof_fraction"] = 6.0, 0.9
    whole["kernels"][0]["calls_per_step"] = 1.5
    table = tables.kernels(whole)
    convolution, norm, copy = table.rows
    assert cells(convolution)[:3] == ["sm90_xmma_fprop_implicit_gemm_f16f16", "8.000", "57.1"]
    assert convolution.cells[0].under.replace("\xa0", " ") == (
        "aten::cudnn_convolution · 64x32x32-64x3x3-s1 · 210 MB of DRAM counted · tensor cores 62.0 % active"
    )
    assert convolution.provenance.startswith("measured: time: torch.profiler, a pass of its own; ")
    assert (convolution.cells[2].bar, norm.cells[2].bar) == (1, pytest.approx(5 / 8))
    assert cells(copy)[3:] == ["1.50", MISSING, MISSING, MISSING, "600.0", "layout and cast"]
    assert [(line.cells[7].bar, line.cells[7].over) for line in (copy, norm)] == [(1.0, True), (0.9, False)]
    assert tables.details({"name": "aten::add", "op": "aten::add", "shape": "2x3"}) == "2x3", "no name twice"


def test_a_report_of_thousands_of_kernels_stays_small(whole):
    assert tables.kernels(whole).omitted == 0
    whole["kernels"] *= 400
    table = tables.kernels(whole)
    assert (len(table.rows), table.omitted) == (tables.MOST, 1200 - tables.MOST)


def test_kernels_that_the_roofline_does_not_show_are_counted(whole):
    assert tables.unplaced(whole) == (
        "Not shown are 1 of 3 kernels, 7.14\xa0% of the time: copies and casts, which do no arithmetic, and kernels "
        "whose bytes or FLOPs are not known."
    )
    assert tables.unplaced(whole | {"kernels": whole["kernels"][:2]}) == ""


def test_levers_multiply_and_their_logarithms_add_up(whole):
    table = tables.levers(whole)
    assert [cells(line)[1:] for line in [*table.rows, table.total]] == [
        ["1,248", "7.13"],
        ["0.00864", f"{MINUS}4.75"],
        ["7.92", "2.07"],
        ["85.3", "4.45"],
    ]
    assert [line.cells[2].bar for line in table.rows] == [1, None, pytest.approx(2.0689 / 7.1292, rel=1e-4)]


def test_an_epoch_has_a_dash_for_what_was_not_logged(whole):
    assert set(whole["epochs"][0]) == set(EPOCH)
    assert cells(tables.epochs(whole).rows[1]) == ["2", "0.400", "1.000", "80.00", MISSING, "90.00", "10,000", "2.000"]


def test_the_environment_says_each_thing_once():
    report = {"run": {"git_sha": "a", "device": "GPU", "dirty": True}}
    report["environment"] = {"version": 1, "git_sha": "a", "device": "cuda", "git_dirty": True, "packages torch": "2"}
    assert tables.environment(report) == [("git sha", "a"), ("device", "GPU"), ("dirty", "yes"), ("torch", "2")]


def test_a_figure_has_its_exact_value_or_the_reason_why_it_lacks(whole):
    tiles = {tile.label: tile for tile in tables.tiles(whole)}
    accuracy, step = tiles["test accuracy"], tiles["a step, median"]
    assert (accuracy.number, accuracy.unit, accuracy.exact) == ("94.07", "%", "0.9407 share")
    assert (step.number, step.unit, step.spread) == ("20.0", "ms", "nine in ten took 20 to 20 ms")
    report = {
        "figures": {"mfu": unavailable("share", "unknown GPU").to_json("MFU")},
        "doubts": [],
        "lacks": ["no trace"],
    }
    (tile,) = tables.tiles(report)
    assert (tile.number, tile.exact, tile.status, tile.source) == (MISSING, "", "unavailable", "unknown GPU")
    assert tables.lacks(report) == ["no trace", "MFU: unknown GPU"]


def sensors(report) -> dict[str, list[str]]:
    return {line.cells[0].text: [*cells(line)[1:], line.provenance] for line in telemetry_table(report).rows}


def test_sensors_are_of_every_stretch_of_training_and_of_nothing_between(whole, bare):
    timeline = whole["timeline"]
    timeline["samples"] |= {
        "t_s": [0, 1, 2, 3, 4],
        "power_w": [9, 100, 900, 200, None],
        "sm_active": [0.1, *[None] * 4],
    }
    timeline["phases"] = [{"name": "training", "start_s": s, "end_s": s + 0.5} for s in (1, 3)]
    found = sensors(whole)
    assert found["power"] == ["100 W", "150 W", "200 W", "measured: 2 samples of the driver"]
    assert found["SMs active"] == [*[MISSING] * 3, "unavailable: no sample"]
    assert found["DRAM active"] == [*[MISSING] * 3, "unavailable: no sample has a value of it"]
    timeline["phases"] = []  # where training is not known, of the whole run
    assert sensors(whole)["power"][:3] == ["9 W", "150 W", "900 W"]
    assert sensors(bare) == {}
