"""CSV files whose quotes, encoding or columns are not what the TOML file says."""

import pytest
from shop_log import BASE, LOG, USERS, histories, rows, task

from pcl_ext.data import tablefile

HEAD = "user_id,item_id,time\n"
OPEN = HEAD + 'a,"mug,1\na,vase,2\nb,"tea,3\nb,cup,4\n'


def test_a_quote_that_nothing_closes_is_told_by_the_id_that_swallows_lines(prepare):
    words = r"column 'item_id' must not hold line breaks, got 'mug,1\\na,vase.* in row 1: .* quote = \"\" reads quotes"
    with pytest.raises(ValueError, match=words):
        prepare(BASE, OPEN)
    want = {"a": ['"mug', "vase"], "b": ['"tea', "cup"]}
    assert histories(prepare(BASE + 'quote = ""\n', OPEN)) == want
    with pytest.raises(
        ValueError, match='(?s)not readable as CSV: .* quote = "" where a quote is a character as others'
    ):
        prepare(BASE, OPEN.replace('"tea', "tea"))


@pytest.mark.parametrize("block", [48, 1 << 22], ids=str)
@pytest.mark.parametrize("values", [["3", "4", "5", "2.5"], ["", "", "", "4"], ["1.5", "2", "", "4"]], ids=str)
def test_a_file_in_many_blocks_has_the_columns_of_one_in_a_single_block(prepare, monkeypatch, block, values):
    """Whatever its first block has them be; ids are coded block by block, of which the last makes all of them text."""
    monkeypatch.setattr(tablefile, "_BLOCK", block)
    lines = [f"{user},{item},2024-01-0{9 - user},{values[user]}\n" for item in (7, 8, 9) for user in range(4)]
    log = "user_id,item_id,time,rating\n" + "".join(lines) + "007,7,2024-01-03,1\n"
    keys = 'source = "events"\nkind = "regression"\nreduce = "last"\ncolumn = "rating"\n'
    users = "user_id,age\n0,1\n"
    dataset = prepare(task(keys), log, users)
    assert histories(dataset) == {"0": ["7", "8", "9"], "007": ["7"]} | {str(u): ["7", "8", "9"] for u in (1, 2, 3)}
    want = {str(user): float(value) for user, value in enumerate(values) if value} | {"007": 1.0}
    assert {name: target for name, target, _ in rows(dataset, "t")} == want


@pytest.mark.parametrize(
    ("bad", "words"),
    [("3,7,x,1", "must be numbers where most are, got 'x' in row 5 of 5"), ("3,7", "Expected 4 columns, got 2: 3,7")],
    ids=str,
)
def test_a_mistake_in_a_later_block_is_told_as_one_in_the_first(prepare, monkeypatch, bad, words):
    log = "user_id,item_id,time,rating\n" + "ann,7,10,1\n" * 4 + bad
    for block in (48, 1 << 22):
        monkeypatch.setattr(tablefile, "_BLOCK", block)
        with pytest.raises(ValueError, match=words):
            prepare(BASE, log)


def test_another_quote(prepare):
    log = HEAD + "'a,b',\"x,1\n"
    assert histories(prepare(BASE + 'quote = "\'"\n', log)) == {"a,b": ['"x']}


@pytest.mark.parametrize("name", ["log", "users", "items"])
def test_an_encoding_that_is_another_is_told(tmp_path, prepare, name):
    texts = {"log": HEAD + "ann,té,1\n", "users": "user_id,city\nann,Malmö\n", "items": "item_id,range\nx,thé\n"}
    (tmp_path / "other.csv").write_bytes(texts[name].encode("latin-1"))
    toml = task('kind = "binary"\ncolumn = "city"\npositive = "Malmö"\n')
    if name == "items":
        toml = BASE + 'where = [["range", "==", "thé"]]\n[items]\nfile = "items.csv"\n'
    toml = toml.replace(f"{name}.csv", "other.csv")
    with pytest.raises(ValueError, match=r"other\.csv.* give the `encoding` of the file, as \"latin-1\""):
        prepare(toml)
    prepare(toml.replace('"other.csv"', '"other.csv"\nencoding = "latin-1"'), log=LOG.replace(",w,", ",x,"))


@pytest.mark.parametrize(
    ("keys", "users", "words"),
    [
        ("", "user_id,city,age,age\nann,a,1,2\n", "users.csv has two columns 'age'"),
        ('columns = ["user_id", "age", "city", "age"]', "ann,1,a,2\n", "users.csv has two columns 'age'"),
        ("columns = [1]", USERS, "users.csv: columns must be a list of column names, got 1"),
        ("text = [1]", USERS, "users.csv: text must be a list of column names, got 1"),
        ('delimiter = ""', USERS, "users.csv: delimiter must be an ASCII character, or several, got ''"),
        ('delimiter = "é"', USERS, "users.csv: delimiter must be an ASCII character, or several, got 'é'"),
        ("quote = \"''\"", USERS, "users.csv: quote must be an ASCII character other than the delimiter, or"),
        ('quote = ","', USERS, "users.csv: quote must be an ASCII character other than the delimiter, or"),
        ("", USERS.replace(",", ";"), "it has user_id;age;city; `delimiter` says what is between the cells"),
        ('delimiter = "::"\nquote = "\'"', USERS, "quote is for a delimiter of one character, got '::'"),
    ],
    ids=str,
)
def test_mistakes_about_a_csv(prepare, keys, users, words):
    toml = task('kind = "binary"\ncolumn = "city"').replace('"users.csv"\n', f'"users.csv"\n{keys}\n')
    with pytest.raises(ValueError, match=r"users\.csv|delimiter") as error:
        prepare(toml, users=users)
    assert words in str(error.value)


def test_a_log_in_utf_16_hears_of_its_encoding(prepare, tmp_path):
    (tmp_path / "wide.csv").write_text(LOG, "utf-16")
    toml = BASE.replace("log.csv", "wide.csv")
    with pytest.raises(ValueError, match=r"wide\.csv is not readable as CSV: .* give the `encoding` of the file"):
        prepare(toml)
    assert histories(prepare(toml + 'encoding = "utf-16"\n')) == histories(prepare(BASE))


def test_a_column_that_is_there_twice_and_not_read_is_no_mistake(prepare):
    log = "user_id,item_id,time,note,note\nann,x,1,a,b\n"
    assert histories(prepare(BASE, log)) == {"ann": ["x"]}


def test_a_toml_file_may_begin_with_a_mark(prepare):
    assert rows(prepare("\ufeff" + task('kind = "regression"\ncolumn = "age"')), "t")
