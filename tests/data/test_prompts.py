"""Prompt lists: every kind gives the same rows, and dirty rows are left out, counted and named."""

import csv
import json

import pytest

from arcflow.data.batches import buckets, nearest
from arcflow.data.prompts import LONGEST, Row, read_prompts

ROWS = [Row("a dog, running", (512, 1024)), Row('a "cat"', (1024, 512)), Row("gr\u00f6\u00dfe", (640, 640))]


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
    assert read_prompts(write(tmp_path / "p.txt")) == ([Row(row.text) for row in ROWS], None)


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
    assert read_prompts(tmp_path / "p.csv", "caption")[0] == [Row("a dog")]


def test_sizes_keep_the_area_and_the_nearest_shape_wins():
    sizes = buckets(1024, 1024, 64)
    assert (1024, 1024) in sizes and all(h % 64 == w % 64 == 0 for h, w in sizes)
    assert all(0.8 <= h * w / 1024**2 <= 1.25 and 0.5 <= h / w <= 2 for h, w in sizes)
    assert sorted((w, h) for h, w in sizes) == sizes
    assert nearest((900, 1600), sizes, (1024, 1024)) == (768, 1344)
    assert nearest((50, 4000), sizes, (1024, 1024))[0] < 800
    assert nearest(None, sizes, (1024, 1024)) == (1024, 1024)
