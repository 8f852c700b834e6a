"""Times of a log: bounds by date and by raw time, fractions, formats, and numbers that are no times."""

import datetime as dt

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shop_log import BASE, histories, rows

from pcl_ext.data import Dataset, prepare_events

HEAD = "user_id,item_id,time\n"


def log_of(times):
    return HEAD + "".join(f"ann,{item},{time}\n" for item, time in zip("abcdefg", times, strict=False))


@pytest.mark.parametrize(
    ("form", "times"),
    [
        ("%Y%m%d", ["20240115", "20240215", "20240515", "20240615"]),
        ("%d%m%Y", ["15012024", "15022024", "15052024", "15062024"]),
        ("%Y-%d-%m", ["2024-01-01", "2024-01-02", "2024-01-05", "2024-01-06"]),
    ],
)
def test_a_format_is_followed_though_the_cells_look_like_numbers_or_dates(prepare, form, times):
    toml = BASE + f'time_format = "{form}"\nuntil = 2024-04-01\n'
    assert histories(prepare(toml, log_of(times))) == {"ann": ["a", "b"]}


def test_a_format_of_times_that_are_numbers_is_refused(tmp_path, prepare):
    pq.write_table(pa.table({"user_id": ["ann"], "item_id": ["a"], "time": [20240115]}), tmp_path / "log.parquet")
    with pytest.raises(ValueError, match=r"\[events\] time_format is for times that are text, got int64"):
        prepare(BASE.replace("log.csv", "log.parquet") + 'time_format = "%Y%m%d"\n')


def test_a_date_is_not_compared_with_numbers_that_are_none(prepare):
    with pytest.raises(ValueError, match=r"until is a date, but times reach 20240615, before 1973 .* 20240115"):
        prepare(BASE + "until = 2024-04-01\n", log_of(["20240115", "20240615"]))


@pytest.mark.parametrize(("until", "want"), [(5, ["a", "b"]), ("1970-01-01T00:00:07Z", ["a", "b", "c"])])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_bounds_of_times_with_a_fraction(prepare, unit, until, want):
    scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    until = until * scale if isinstance(until, int) else f'"{until}"'
    log = log_of([f"{time * scale:.1f}" for time in (1.5, 2, 6, 7)])
    assert histories(prepare(BASE + f'time_unit = "{unit}"\nuntil = {until}\n', log)) == {"ann": want}


def test_a_bound_between_two_whole_seconds_is_the_later_one(prepare):
    toml = BASE + 'until = "1970-01-01T00:00:05.4Z"\n'
    assert histories(prepare(toml, log_of([4, 5, 6]))) == {"ann": ["a", "b"]}


def test_a_task_of_fractions_begins_at_its_raw_time(prepare):
    toml = BASE + 'until = 5\n[[task]]\nname = "t"\nkind = "items"\nsource = "events"\nfrom = 7\n'
    assert rows(prepare(toml, log_of([1.0, 2.0, 6.0, 7.0])), "t") == [("ann", "d", 2)]


def test_times_too_large_for_their_unit_are_refused(prepare):
    with pytest.raises(ValueError, match=r"times reach 1\.7e\+18, too many 's'; give \[events\] time_unit"):
        prepare(BASE, log_of(["1.7e18", "1.6e18"]))
    toml = BASE + 'time_unit = "ns"\n'
    assert histories(prepare(toml, log_of(["1.7e18", "1.6e18"]))) == {"ann": ["b", "a"]}


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("time", ["17", "1.5e9", "-3"])
def test_the_word_among_numbers_is_named(prepare, place, time):
    times = [time] * 5
    times[place] = "unknown"
    with pytest.raises(ValueError, match=rf"must be numbers where most are, got 'unknown' in row {place + 1} of 5"):
        prepare(BASE, log_of(times))


def test_numbers_that_are_read_as_text_are_no_times(prepare):
    with pytest.raises(ValueError, match="must be times as 2011-09-10 12:30:00, .* got '17' in row 1 of 2"):
        prepare(BASE + 'text = ["time"]\n', log_of([17, 18]))


@pytest.mark.parametrize(
    ("form", "words"), [("%Y-%m-%d %H:%M %Z", "%Z passes over .* %z"), ("%d.%m.%Y %H:%M %p", "%H passes over .* %I")]
)
def test_a_format_that_would_pass_over_a_zone_or_half_a_day_is_refused(prepare, form, words):
    with pytest.raises(ValueError, match=rf"\[events\] time_format: {words}"):
        prepare(BASE + f'time_format = "{form}"\n', log_of(["2024-03-31 10:00 CET"]))


def test_a_format_reads_zones_and_halves_of_a_day(prepare):
    zones = log_of(["2024-03-31 03:10 +0200", "2024-03-31 01:30 +0100", "2024-03-31 00:00 +0000"])
    assert histories(prepare(BASE + 'time_format = "%Y-%m-%d %H:%M %z"\n', zones)) == {"ann": ["c", "b", "a"]}
    halves = log_of(["03.01.2024 10:00 PM", "03.01.2024 11:00 AM"])
    assert histories(prepare(BASE + 'time_format = "%d.%m.%Y %I:%M %p"\n', halves)) == {"ann": ["b", "a"]}


DAY = 86400
TIMES = {
    "s": pa.array([DAY, 2 * DAY, 3 * DAY]),
    "ms": pa.array([1000 * DAY, 2000 * DAY, 3000 * DAY], pa.int64()),
    "ns": pa.array([10**9 * DAY, 2 * 10**9 * DAY, 3 * 10**9 * DAY], pa.int64()),
    "float": pa.array([DAY + 0.25, 2.0 * DAY, 3.0 * DAY]),
    "timestamp": pa.array([dt.datetime(1970, 1, day) for day in (2, 3, 4)], pa.timestamp("ms")),
    "zone": pa.array([dt.datetime(1970, 1, day) for day in (2, 3, 4)], pa.timestamp("ns", "Europe/Rome")),
    "date": pa.array([dt.date(1970, 1, day) for day in (2, 3, 4)], pa.date32()),
    "iso": pa.array(["1970-01-02", "1970-01-03", "1970-01-04"]),
    "iso time": pa.array(["1970-01-02 10:00:00", "1970-01-03 00:00:00", "1970-01-04T00:00:00"]),
    "format": pa.array(["2/1/1970", "3/1/1970", "4/1/1970"]),
}


@pytest.mark.parametrize("kind", TIMES)
@pytest.mark.parametrize("until", ["1970-01-03", '"1970-01-03"', "1970-01-03T00:00:00Z"])
def test_times_of_all_kinds(tmp_path, kind, until):
    log = pa.table(
        {"user_id": [1, 1, 1], "item_id": pa.array(["a", "b", "c"]).dictionary_encode(), "when": TIMES[kind]}
    )
    pq.write_table(log.take([2, 0, 1]), tmp_path / "log.parquet")
    more = {"format": 'time_format = "%d/%m/%Y"'}.get(kind, f'time_unit = "{kind if kind in ("ms", "ns") else "s"}"')
    toml = f'name = "shop"\n[events]\nfile = "log.parquet"\ntime = "when"\nuntil = {until}\n{more}\n'
    (tmp_path / "shop.toml").write_text(toml)
    prepare_events(tmp_path / "shop.toml", tmp_path / "out")
    assert histories(Dataset(tmp_path / "out")) == {"1": ["a"]}
    (tmp_path / "shop.toml").write_text(toml.replace(f"until = {until}", ""))
    prepare_events(tmp_path / "shop.toml", tmp_path / "all")
    assert histories(Dataset(tmp_path / "all")) == {"1": ["a", "b", "c"]}
