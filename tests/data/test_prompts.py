"""Prompt lists: every kind gives the same rows, and dirty rows are left out, counted and named."""

import csv
import json

import pytest

from arcflow.config import Data
from arcflow.data.batches import buckets, nearest_size, open_prompts
from arcflow.data.prompts import LONGEST, ListedPrompt, read_prompts

ROWS = [
    ListedPrompt("a dog, running", (512, 1024)),
    ListedPrompt('a "cat"', (1024, 512)),
    ListedPrompt("gr\u00f6\u00dfe", (640, 640)),
]


def write(path, rows=ROWS):
    """The rows as a file of this kind."""
    if path.suffix == ".txt":
        path.write_text("\n\n".join(row.text for row in rows), "utf-8")
    elif path.suffix == ".jsonl":
        path.write_text(
            "".join(json.dumps({"prompt": r.text, "height": r.size[0], "width": r.size[1]}) + "\n" for r in rows)
        )
    elif path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = {
            "prompt": [r.text for r in rows],
            "height": [r.size[0] for r in rows],
            "width": [r.size[1] for r in rows],
        }
        parquet.write_table(arrow.table(table), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            table = csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writerow(["id", "prompt", "height", "width"])
            table.writerows([i, row.text, *row.size] for i, row in enumerate(rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_gives_the_same_rows(tmp_path, suffix):
    assert read_prompts(write(tmp_path / f"p{suffix}")) == (ROWS, None)


def test_a_text_file_has_a_prompt_a_line_and_no_sizes(tmp_path):
    assert read_prompts(write(tmp_path / "p.txt")) == ([ListedPrompt(row.text) for row in ROWS], None)


def test_dirty_rows_are_left_out_counted_and_named(tmp_path):
    rows = ["a dog", 7, "", "x" * (LONGEST + 1), "a cat", None, " ", "  "]
    lines = [json.dumps({"prompt": row}) for row in rows] + ['{"text": "a cow"}', "not json"]
    path = tmp_path / "p.jsonl"
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n" + b'{"prompt": "a hen", "height": 0, "width": 5}\n')
    found, message = read_prompts(path)
    assert [row.text for row in found] == ["a dog", "a cat"]
    assert message == (
        f"{path}: 10 of 12 rows left out: 3 empty (line 3, 7, 8); 2 not text (line 2, 6); 1 over-long (line 4); "
        f"1 without 'prompt' (line 9); 1 not JSON (line 10); 1 wrong encoding (line 11); 1 no size (line 12)"
    )


def test_a_table_in_another_encoding_loses_only_the_rows_that_are(tmp_path):
    (tmp_path / "p.csv").write_bytes("prompt\na dog\ngr\u00f6\u00dfe\n".encode("latin-1"))
    found, message = read_prompts(tmp_path / "p.csv")
    assert [row.text for row in found] == ["a dog"] and "1 wrong encoding (line 3)" in str(message)


def test_the_strict_stop_at_the_first(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a dog"}\n{"prompt": 7}\n')
    with pytest.raises(ValueError, match="p.jsonl, line 2: not text .'7'., expected a prompt.*--data.no-strict"):
        read_prompts(tmp_path / "p.jsonl", strict=True)


def test_lists_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "p.csv").write_text("caption\na dog\n")
    for name, said in (
        ("nowhere.txt", "no prompt file .*check the path"),
        ("p.docx", "of a kind that is not read: expected .txt, .jsonl"),
        ("empty.txt", "empty.txt is empty: expected prompts"),
        ("p.csv", r"no column 'prompt': expected one of \['caption'\]; name it with --data.column"),
    ):
        with pytest.raises(ValueError, match=said):
            read_prompts(tmp_path / name)
    assert read_prompts(tmp_path / "p.csv", "caption")[0] == [ListedPrompt("a dog")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv"])
def test_text_of_another_width_is_read_as_written(tmp_path, encoding, suffix):
    texts = [f"a photo of cat {i}, gr\u00f6\u00dfe" for i in range(10)]
    lines = {
        ".txt": texts,
        ".jsonl": [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts],
        ".csv": ["prompt", *(f'"{text}"' for text in texts)],
        ".tsv": ["prompt", *texts],
    }[suffix]
    (tmp_path / f"list{suffix}").write_bytes("".join(f"{line}\r\n" for line in lines).encode(encoding))
    rows, message = read_prompts(tmp_path / f"list{suffix}")
    assert [row.text for row in rows] == texts and message is None


def test_rows_that_show_nothing_are_no_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\u200b\n\ufeff\na \0dog\n\u3164\n\ufeffa hen\na\u2028b\n", "utf-8")
    rows, message = read_prompts(tmp_path / "p.txt")
    assert [row.text for row in rows] == ["a cat", "a hen", "a\u2028b"]
    assert "3 empty (line 2, 3, 5); 1 wrong encoding (line 4)" in str(message)


def test_a_quote_that_nobody_closes_costs_its_own_row(tmp_path):
    for count in (10, 2_000):
        lines = ["prompt", *(f"a photo of cat {i}" + " and a dog" * 20 for i in range(count))]
        lines[3] = '"' + lines[3]
        (tmp_path / "p.csv").write_text("\n".join(lines) + "\n")
        rows, message = read_prompts(tmp_path / "p.csv")
        assert len(rows) == count - 1 and rows[2].text.startswith("a photo of cat 3 ")
        assert f"1 of {count} rows left out: 1 quotes that do not match (line 4)" in str(message)
    (tmp_path / "p.csv").write_text('prompt,n\n"a cat,1\na "big" dog,2\n"two\nlines",3\n"a hen,4\na pig,"5"\n')
    rows, message = read_prompts(tmp_path / "p.csv")
    assert [row.text for row in rows] == ['a "big" dog', "two\nlines", "a pig"] and "(line 2, 6)" in str(message)


def test_long_cells_are_rows_that_are_counted(tmp_path):
    (tmp_path / "p.csv").write_text("prompt\na\n" + "x" * 200_000 + "\nb\n")
    rows, message = read_prompts(tmp_path / "p.csv")
    assert [row.text for row in rows] == ["a", "b"] and "1 of 3 rows left out: 1 over-long (line 3)" in str(message)
    (tmp_path / "p.csv").write_text('prompt\n"' + "a line of many\n" * 400 + '"\nb\n')
    rows, message = read_prompts(tmp_path / "p.csv")
    assert [row.text for row in rows] == ["b"] and "401 of 402 rows left out: 400 inside" in str(message)
    (tmp_path / "p.csv").write_text("prompt,notes\na," + "x" * 200_000 + "\n")
    assert read_prompts(tmp_path / "p.csv")[0] == [ListedPrompt("a")]


def test_quotes_in_a_table_of_tabs_are_the_texts_own(tmp_path):
    lines = ['"quiet" said the cat\t1', '"open\t1', "a dog\t1", 'a "cup"\t1', '"a ""jug"""\t1']
    (tmp_path / "p.tsv").write_text("\n".join(["prompt\tn", *lines]))
    rows, message = read_prompts(tmp_path / "p.tsv")
    assert [row.text for row in rows] == ['"quiet" said the cat', '"open', "a dog", 'a "cup"', 'a "jug"']
    assert message is None


def test_json_that_no_library_reads_is_one_row(tmp_path):
    lines = ['{"prompt": "a"}', "[" * 200_000, '{"prompt": "b", "n": ' + "9" * 5000 + "}", '{"a":' * 100_000]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    rows, message = read_prompts(tmp_path / "p.jsonl")
    assert [row.text for row in rows] == ["a", "b"] and "2 not JSON (line 2, 4)" in str(message)


def test_sizes_of_pandas_are_sizes(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,height,width\na cat,1024.0,768.0\na dog,,\na pig,12.5,9\na hen,4,\n")
    rows, message = read_prompts(tmp_path / "p.csv")
    assert rows == [ListedPrompt("a cat", (1024, 768)), ListedPrompt("a dog")] and "2 no size (line 4, 5)" in str(
        message
    )


def test_images_beside_the_prompts_are_not_read(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    asked, real = [], parquet.ParquetFile.iter_batches
    table = arrow.table(
        {"prompt": ["a", "b"], "image": [{"bytes": b"x", "path": ""}] * 2, "width": [float("nan"), 8.0]}
    )
    parquet.write_table(table.append_column("height", [[None, 8]]), tmp_path / "p.parquet")
    monkeypatch.setattr(
        parquet.ParquetFile, "iter_batches", lambda self, columns: asked.append(columns) or real(self, columns=columns)
    )
    assert read_prompts(tmp_path / "p.parquet")[0] == [ListedPrompt("a"), ListedPrompt("b", (8, 8))]
    assert asked == [["prompt", "height", "width"]]
    with pytest.raises(ValueError, match="'image' has the type struct.*expected text"):
        read_prompts(tmp_path / "p.parquet", "image")


def test_a_broken_parquet_file_is_named(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"prompt": ["a"] * 1000}), tmp_path / "p.parquet")
    whole = (tmp_path / "p.parquet").read_bytes()
    for broken in (whole[:100], b"no parquet", b"", whole[:10] + b"\xff" * 20 + whole[30:]):
        (tmp_path / "p.parquet").write_bytes(broken)
        with pytest.raises(ValueError, match="p.parquet cannot be read"):
            read_prompts(tmp_path / "p.parquet")
    raw = arrow.array([b"a", b"\xff\xfe"], arrow.binary())
    text = arrow.Array.from_buffers(arrow.string(), 2, raw.buffers())
    parquet.write_table(arrow.table({"prompt": text}), tmp_path / "p.parquet")
    rows, message = read_prompts(tmp_path / "p.parquet")
    assert rows == [ListedPrompt("a")] and "1 wrong encoding (row 2)" in str(message)


def test_endings_say_what_is_read(tmp_path):
    (tmp_path / "LIST.TXT").write_text("a cat\n")
    assert Data(prompts=str(tmp_path / "LIST.TXT")).streamed is False
    assert read_prompts(tmp_path / "LIST.TXT")[0] == [ListedPrompt("a cat")]
    for name in ("list.json", "x.txt.gz", "no-such.xlsx"):
        with pytest.raises(ValueError, match="expected .*, a file .*, or a data set"):
            Data(prompts=str(tmp_path / name), cache=False)
    (tmp_path / "list").write_text("a cat\n")
    with pytest.raises(ValueError, match="rename or convert the file"):
        Data(prompts=str(tmp_path / "list"), cache=False)


def test_sizes_keep_the_area_and_the_nearest_shape_wins():
    sizes = buckets(1024, 1024, 64)
    assert (1024, 1024) in sizes and all(h % 64 == w % 64 == 0 for h, w in sizes)
    assert all(0.8 <= h * w / 1024**2 <= 1.25 and 0.5 <= h / w <= 2 for h, w in sizes)
    assert sorted((w, h) for h, w in sizes) == sizes
    assert nearest_size((900, 1600), sizes, (1024, 1024)) == (768, 1344)
    assert nearest_size((50, 4000), sizes, (1024, 1024))[0] < 800
    assert nearest_size(None, sizes, (1024, 1024)) == (1024, 1024)


def test_frames_are_read_like_sizes(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,frames\na,5\nb,\nc,9\nd,2.5\n")
    rows, message = read_prompts(tmp_path / "p.csv")
    assert [row.frames for row in rows] == [5, None, 9] and "1 no number of frames (line 5)" in str(message)
    sizes = [(32, 32), (32, 64), (32, 32, 5), (32, 64, 5)]
    assert nearest_size(None, sizes, (32, 32), 5) == (32, 32, 5) and nearest_size((1, 2), sizes, (32, 32), 5) == (
        32,
        64,
        5,
    )
    assert nearest_size((1, 2), sizes, (32, 32)) == (32, 64)


def test_a_batch_has_videos_of_as_many_frames_as_its_rows_say(tmp_path):
    lines = [json.dumps({"prompt": f"p{i}", "frames": (5, 9)[i % 2]}) for i in range(9)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    data = Data(prompts=str(tmp_path / "p.jsonl"), held_out_count=1, height=32, width=32, frames=5, buckets=True)
    prompts = open_prompts(data, seed=0, batch=2)
    seen = {batch.size: batch.prompts for batch in map(prompts.batch, range(4))}
    assert set(seen) == {(32, 32, 5), (32, 32, 9)}
    assert all(int(text[1:]) % 2 == (size[2] == 9) for size, texts in seen.items() for text in texts)
