import gzip
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiling.account import trace_events
from profiling.account.trace_events import TraceEvents

# Tabs stand in the names as they are, which JSON forbids.
EVENTS = [{"ph": "X", "name": f"kernel é\t{i}", "ts": "1414456661859.938", "args": {"stream": i}} for i in range(5)]
BODY = ",\n".join(json.dumps(e, ensure_ascii=False).replace(f'"{e["ts"]}"', e["ts"]) for e in EVENTS)
BODY = BODY.replace("\\t", "\t")
HEAD, TAIL = '{"schemaVersion": 100, "traceEvents": [\n', '\n], "deviceProperties": [{"id": 0}], "traceName": "}]"}'
TEXT = HEAD + BODY + TAIL


def read(path, content: bytes):
    path.write_bytes(content)
    events = TraceEvents(path)
    return list(events), events


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.json"


WRITTEN = {
    "as_written": TEXT.encode(),
    "with_a_byte_order_mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "gzip_whatever_its_name": gzip.compress(TEXT.encode()),
    "gzip_of_two_members": gzip.compress(TEXT[:300].encode()) + gzip.compress(TEXT[300:].encode()),
    "other_white_space": TEXT.encode().replace(b"\n", b"\r\n\t"),
    "other_values_among_the_events": TEXT.replace("[\n{", "[5, null, {").encode(),
    "bare_array": f"[{BODY}]".encode(),
}


@pytest.mark.parametrize("content", WRITTEN.values(), ids=WRITTEN)
def test_events_come_as_they_were_written(path, content):
    events, said = read(path, content)
    assert (events, said.lacks) == (EVENTS, [])


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_nothing_depends_on_where_a_chunk_ends(path, monkeypatch, chunk):
    monkeypatch.setattr(trace_events, "CHUNK_BYTES", chunk)
    for name in ("as_written", "gzip_whatever_its_name"):
        events, said = read(path, WRITTEN[name])
        assert (events, said.lacks) == (EVENTS, [])


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1), compress=st.booleans())
def test_events_before_a_cut_are_read(tmp_path_factory, share, compress):
    content = WRITTEN["gzip_whatever_its_name" if compress else "as_written"]
    cut = content[: int(share * (len(content) - 1))]
    events, said = read(tmp_path_factory.mktemp("cut") / "trace.json", cut)
    assert events == EVENTS[: len(events)]
    assert compress or len(events) >= cut.count(b"}}")
    assert any(lack.startswith("trace incomplete: ") for lack in said.lacks)


def test_event_right_before_a_cut_is_read(path):
    events, said = read(path, TEXT[: TEXT.index("}}") + 2].encode())
    assert events == EVENTS[:1]
    assert "cut off" in said.lacks[0]


DAMAGED = {
    "huge_string": (lambda event: event.replace("kernel", "x" * 5_000), "Unterminated string"),
    "number_of_6000_digits": (lambda event: event.replace('"stream": ', '"stream": ' + "9" * 6_000), "4300 digits"),
    "wrong_value": (lambda event: event.replace('"stream": ', '"stream": :'), "Expecting value"),
    "half_an_event": (lambda event: event[:20], "Expecting"),
    "nested_too_deep": (lambda event: event.replace('"stream": ', '"stream": ' + "[" * 100_000), "recursion"),
}


@pytest.mark.parametrize("places", [[7], [7, 8, 30]], ids=["one", "several"])
@pytest.mark.parametrize(("damage", "why"), DAMAGED.values(), ids=DAMAGED)
def test_events_behind_a_damaged_one_are_read(path, monkeypatch, damage, why, places):
    monkeypatch.setattr(trace_events, "CHUNK_BYTES", 1_000)
    monkeypatch.setattr(trace_events, "LARGEST_VALUE", 4_000)
    texts = BODY.split(",\n") * 12
    written = [damage(text) if i in places else text for i, text in enumerate(texts)]
    events, said = read(path, (HEAD + ",\n".join(written) + TAIL).encode())
    lost = {*places} if damage(texts[0]).endswith("}") else {*places, *(place + 1 for place in places)}  # the next, too
    assert events == [EVENTS[i % 5] for i in range(60) if i not in lost]
    (lack,) = said.lacks
    assert lack.startswith(f"trace incomplete: not JSON from character {len(HEAD + ',n'.join(texts[:7])) + 2:,} to ")
    assert why in lack
    assert lack.endswith(" more places") == (len(places) > 1)


def test_most_of_a_truncated_gzip_file_is_read(path):
    many = "[" + ",".join(json.dumps({"name": str(i * 7919 % 10_007)}) for i in range(10_000)) + "]"
    events, said = read(path, gzip.compress(many.encode())[:-2_000])
    assert len(events) > 5_000
    assert "gzip" in said.lacks[0]


GARBAGE = {
    "empty": b"",
    "white_space": b"\n \n",
    "nul_bytes_of_a_file_never_written": b"\0" * 1_000,
    "html": b"<html>not found</html>",
    "no_container": b"null",
    "no_events": b"{}",
    "events_are_no_list": b'{"traceEvents": 5}',
    "wrong_event": b'{"traceEvents": [{"a": }]}',
    "missing_colon": b'{"traceEvents" [{}]}',
    "nested_too_deep_array": b"[" * 200_000,
    "nested_too_deep_object": b'[{"a": ' * 200_000,
    "number_of_6000_digits": b'[{"ts": ' + b"9" * 6_000 + b"}]",
    "gzip_garbage": b"\x1f\x8b\x08\x00" + b"\xff" * 100,
    "gzip_header_alone": b"\x1f\x8b",
    "gzip_of_wrong_checksum": gzip.compress(b"[{}]")[:-8] + b"\0" * 8,
    "every_byte": bytes(range(256)) * 10,
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_said_and_raises_nothing(path, content):
    events, said = read(path, content)
    assert events in ([], [{}])
    assert said.lacks
    assert all(lack.startswith("trace incomplete: ") and len(lack) <= 200 for lack in said.lacks)


def test_missing_file_raises(path):
    with pytest.raises(FileNotFoundError):
        list(TraceEvents(path))


def test_event_without_end_does_not_fill_the_memory(path, monkeypatch):
    monkeypatch.setattr(trace_events, "LARGEST_VALUE", 1 << 20)
    path.write_bytes(b'{"traceEvents": [{"name": "first"}, {"name": "' + b"x" * (12 << 20))
    events = TraceEvents(path)
    tracemalloc.start()
    names = [event["name"] for event in events]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert names == ["first"]
    assert "not JSON from character 36 on" in events.lacks[0]
    assert peak < 8 << 20
