import gzip
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiling.account import trace_events
from profiling.account.trace_events import TraceEvents

EVENTS = [{"ph": "X", "name": f"kernel é {i}", "ts": "1414456661859.938", "args": {"stream": i}} for i in range(5)]
BODY = ",\n".join(json.dumps(e, ensure_ascii=False).replace(f'"{e["ts"]}"', e["ts"]) for e in EVENTS)
HEAD, TAIL = '{"schemaVersion": 100, "traceEvents": [\n', '\n], "deviceProperties": [{"id": 0}], "traceName": "}]"}'
TEXT = HEAD + BODY + TAIL


def read(path, content: bytes):
    path.write_bytes(content)
    events = TraceEvents(path)
    return list(events), events


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.json"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(TEXT.encode(), id="as_written"),
        pytest.param(b"\xef\xbb\xbf" + TEXT.encode(), id="with_a_byte_order_mark"),
        pytest.param(gzip.compress(TEXT.encode()), id="gzip_whatever_its_name"),
        pytest.param(gzip.compress(TEXT[:300].encode()) + gzip.compress(TEXT[300:].encode()), id="gzip_of_two_members"),
        pytest.param(TEXT.encode().replace(b"\n", b"\r\n\t"), id="other_white_space"),
        pytest.param(TEXT.replace("[\n{", "[5, null, {").encode(), id="what_is_no_event_is_left_out"),
    ],
)
def test_events_come_as_they_were_written(path, content):
    events, said = read(path, content)
    assert events == EVENTS
    assert said.properties == {"deviceProperties": [{"id": 0}]}
    assert said.lacks == []


def test_bare_array_is_a_trace(path):
    events, said = read(path, f"[{BODY}]".encode())
    assert events == EVENTS
    assert said.lacks == []


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_nothing_depends_on_where_a_chunk_ends(path, monkeypatch, chunk):
    monkeypatch.setattr(trace_events, "CHUNK_BYTES", chunk)
    for content in (TEXT.encode(), gzip.compress(TEXT.encode())):
        events, said = read(path, content)
        assert events == EVENTS
        assert said.lacks == []


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1), compress=st.booleans())
def test_what_stands_before_a_cut_is_read(tmp_path_factory, share, compress):
    content = gzip.compress(TEXT.encode()) if compress else TEXT.encode()
    cut = content[: int(share * (len(content) - 1))]
    events, said = read(tmp_path_factory.mktemp("cut") / "trace.json", cut)
    assert events == EVENTS[: len(events)]
    if not compress:
        assert len(events) >= cut.count(b"}}")
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
def test_what_stands_behind_a_damaged_event_is_read(path, monkeypatch, damage, why, places):
    monkeypatch.setattr(trace_events, "CHUNK_BYTES", 1_000)
    monkeypatch.setattr(trace_events, "LARGEST_VALUE", 4_000)
    texts = BODY.split(",\n") * 12
    written = [damage(text) if i in places else text for i, text in enumerate(texts)]
    events, said = read(path, (HEAD + ",\n".join(written) + TAIL).encode())
    lost = {*places} if damage(texts[0]).endswith("}") else {*places, *(place + 1 for place in places)}  # the next, too
    assert events == [EVENTS[i % 5] for i in range(60) if i not in lost]
    assert said.properties == {"deviceProperties": [{"id": 0}]}
    (lack,) = said.lacks
    assert lack.startswith(f"trace incomplete: not JSON from character {len(HEAD + ',n'.join(texts[:7])) + 2:,} to ")
    assert why in lack
    assert lack.endswith(" more places") == (len(places) > 1)


def test_names_with_control_characters_are_read_though_json_forbids_them(path):
    events, said = read(path, b'[{"name": "a\0b\tc\nd"}]')
    assert events == [{"name": "a\0b\tc\nd"}]
    assert said.lacks == []


def test_most_of_a_truncated_gzip_file_is_read(path):
    many = "[" + ",".join(json.dumps({"name": str(i * 7919 % 10_007)}) for i in range(40_000)) + "]"
    events, said = read(path, gzip.compress(many.encode())[:-2_000])
    assert len(events) > 20_000
    assert "gzip" in said.lacks[0]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\n \n", id="white_space"),
        pytest.param(b"\0" * 1_000, id="nul_bytes_of_a_file_never_written"),
        pytest.param(b"<html>not found</html>", id="html"),
        pytest.param(b"null", id="no_container"),
        pytest.param(b"{}", id="no_events"),
        pytest.param(b'{"traceEvents": 5}', id="events_are_no_list"),
        pytest.param(b'{"traceEvents": [{"a": }]}', id="wrong_event"),
        pytest.param(b'{"traceEvents" [{}]}', id="missing_colon"),
        pytest.param(b"[" * 200_000, id="nested_too_deep_array"),
        pytest.param(b'[{"a": ' * 200_000, id="nested_too_deep_object"),
        pytest.param(b'[{"ts": ' + b"9" * 6_000 + b"}]", id="number_of_6000_digits"),
        pytest.param(b"\x1f\x8b\x08\x00" + b"\xff" * 100, id="gzip_garbage"),
        pytest.param(b"\x1f\x8b", id="gzip_header_alone"),
        pytest.param(gzip.compress(b"[{}]")[:-8] + b"\0" * 8, id="gzip_of_wrong_checksum"),
        pytest.param(bytes(range(256)) * 10, id="every_byte"),
    ],
)
def test_garbage_is_said_and_raises_nothing(path, content):
    events, said = read(path, content)
    assert all(isinstance(event, dict) for event in events)
    assert len(events) <= 1
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
