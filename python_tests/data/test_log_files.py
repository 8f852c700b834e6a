"""A log's files: delimiters, names and encodings, and folders of Parquet files."""

import io

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyarrow import csv
from shop_log import BASE, LOG, histories

from pcl_ext.data import Dataset, prepare_events


@pytest.mark.parametrize(("delimiter", "text"), [("\\t", "\t"), (";", ";"), ("::", "::"), ("|", "|")])
def test_delimiters_names_and_encodings(tmp_path, delimiter, text):
    (tmp_path / "log.dat").write_bytes(
        "\n".join(text.join(row) for row in (("1", "é", "2"), ("1", "b", "1"))).encode("latin-1")
    )
    (tmp_path / "shop.toml").write_text(
        f'name = "shop"\n[events]\nfile = "log.dat"\ndelimiter = "{delimiter}"\nencoding = "latin-1"\n'
        'columns = ["who", "what", "when"]\nuser = "who"\nitem = "what"\ntime = "when"\n'
    )
    prepare_events(tmp_path / "shop.toml", tmp_path / "out")
    assert histories(Dataset(tmp_path / "out")) == {"1": ["b", "é"]}


def test_files_of_a_folder_agree_on_the_columns_that_are_read(prepare, tmp_path):
    (tmp_path / "parts").mkdir()
    for place, note in enumerate((5, "five")):
        part = {"user_id": ["ann"], "item_id": ["xy"[place]], "time": [place], "note": [note]}
        pq.write_table(pa.table(part), tmp_path / "parts" / f"part-{place}.parquet")
    text = BASE.replace("log.csv", "parts")
    assert histories(prepare(text)) == {"ann": ["x", "y"]}
    with pytest.raises(ValueError, match=r"part-1\.parquet does not go with .* note .* int64 vs string"):
        prepare(text + 'where = [["note", "==", 5]]\n')


def test_a_log_may_be_a_folder_of_parquet_files(prepare, tmp_path):
    """Parts in the order of their names, whose folders may name a column; what is no part is left alone."""
    want = histories(prepare(BASE + 'where = [["kind", "==", "buy"]]'))
    log = csv.read_csv(io.BytesIO(LOG.encode()))
    log = log.set_column(log.column_names.index("time"), "time", log["time"].cast(pa.int32()))
    for kind in ("buy", "back"):
        part = log.filter(pc.equal(log["kind"], kind)).drop_columns("kind")
        for place, (first, count) in enumerate(((0, 2), (2, 99))):
            folder = tmp_path / "parts" / f"kind={kind}"
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(part.slice(first, count), folder / f"part-{place}.parquet")
    for name in ("_SUCCESS", "kind=buy/.part-9.parquet", "notes.txt"):
        (tmp_path / "parts" / name).write_text("no part")
    text = BASE.replace("log.csv", "parts") + 'where = [["kind", "==", "buy"]]'
    dataset = prepare(text)
    assert histories(dataset) == want
    assert [part["file"] for part in dataset.info["sources"]] == ["part-0.parquet", "part-1.parquet"] * 2
    wide = pa.table({"user_id": ["ann"], "item_id": ["z"], "time": pa.array([2**40]), "rating": [None]})
    pq.write_table(wide, tmp_path / "parts" / "kind=buy" / "part-2.parquet")  # a wider time, a column of nulls
    assert histories(prepare(text))["ann"] == [*want["ann"], "z"]
    pq.write_table(wide.drop_columns("item_id"), tmp_path / "parts" / "kind=buy" / "part-3.parquet")
    with pytest.raises(ValueError, match=r"part-3\.parquet has no column 'item_id'"):
        prepare(text)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"\[events\]: folder .*empty has no Parquet files"):
        prepare(BASE.replace("log.csv", "empty"))
