"""A run's record by name: what is not known of it is kept, what is missing is empty."""

from pcl_ext.store.record import Record

PARTS = "dataset protocol config machine matrix references standard_error samples outputs curves".split()


def test_a_record_has_its_parts_in_order_then_what_is_not_known():
    values = {"more": 1, "note": [2], "outputs": {"next": None}, "dataset": {"name": "shop"}}
    record = Record.from_json(values)
    assert (record.dataset, record.outputs, record.more) == (
        values["dataset"],
        values["outputs"],
        {"more": 1, "note": [2]},
    )
    assert record.to_json() == dict.fromkeys(PARTS, {}) | values
    assert list(record.to_json()) == [*PARTS, "more", "note"]


def test_parts_that_are_missing_are_not_shared():
    Record().outputs["next"] = "a"
    assert Record.from_json({}) == Record()
    assert Record().outputs == {}
