"""`prepare events` on small logs whose datasets can be written down by hand."""

import json
from hashlib import sha256

import numpy as np
import pytest
from shop_log import BASE, LOG, histories, originals, rows, task

from pcl_ext.data import fold_of, labels, targets
from pcl_ext.data.split import stable_hash


def test_events_in_any_order_become_histories_in_time_order(prepare):
    dataset = prepare(BASE)
    assert histories(dataset) == {"ann": ["z", "x", "w", "x"], "bob": ["y", "x", "w"], "cat": ["y"]}
    assert dataset.times.tolist() == [1, 2, 3, 4, 1, 5, 7, 9]
    assert dataset.num_items == 4
    assert dataset.info["counts"]["events"] == 8
    assert [s["file"] for s in dataset.info["sources"]] == ["log.csv"]


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ("distinct = true", {"ann": ["z", "x", "w"], "bob": ["y", "x", "w"], "cat": ["y"]}),
        ("min_length = 3", {"ann": ["z", "x", "w", "x"], "bob": ["y", "x", "w"]}),
        ("until = 5", {"ann": ["z", "x", "w", "x"], "bob": ["y"]}),
        ('where = [["kind", "==", "buy"], ["rating", ">=", 2]]', {"ann": ["x", "x"], "bob": ["y", "x"], "cat": ["y"]}),
        ('where = [["kind", "!=", "buy"]]', {"ann": ["w"]}),
        ('where = [["rating", "in", [1, 4]]]', {"ann": ["z"], "bob": ["x"]}),
        ('where = [["rating", "not in", [1, 4, 5]]]', {"ann": ["x"], "bob": ["y"]}),
        ('where = [["rating", "<", 2.5]]', {"ann": ["z", "x"]}),
        ('where = [["item_id", "in", ["w"]]]', {"ann": ["w"], "bob": ["w"]}),
    ],
    ids=str,
)
def test_what_a_history_holds(prepare, keys, want):
    assert histories(prepare(BASE + keys)) == want


def test_targets_that_are_all_visible_are_named_so(prepare):
    text = BASE + '[[task]]\nname = "again"\nkind = "items"\nsource = "events"\n'
    with pytest.raises(ValueError, match="is part of the visible history, or has none before it"):
        prepare(text)


def test_users_are_split_by_the_hash_of_their_own_ids(prepare):
    dataset = prepare(BASE, log="user_id,item_id,time\n" + "".join(f"u{i},a,1\n" for i in range(300)))
    names = originals(dataset, "users.parquet", "user_id")
    want = fold_of("shop", [names[int(user)] for user in dataset.user_id])
    assert dataset.fold.tolist() == want.tolist()
    bucket = int.from_bytes(sha256(b"shop:user:u1").digest()[:8], "big") % 100
    assert fold_of("shop", ["u1"]).tolist() == [int(bucket >= 80) + int(bucket >= 85)]
    rotated = [
        prepare(BASE, log="user_id,item_id,time\n" + "".join(f"u{i},a,1\n" for i in range(300)), rotate=f)
        for f in range(5)
    ]
    tested = np.stack([d.fold == 2 for d in rotated])
    assert (tested.sum(axis=0) == 1).all()


def test_integer_ids_stay_and_are_hashed_as_written(prepare):
    dataset = prepare(BASE, log="user_id,item_id,time\n30,7,1\n-4,9,1\n")
    assert dataset.user_id.tolist() == [-4, 30]
    assert histories(dataset) == {"-4": ["9"], "30": ["7"]}
    assert dataset.fold.tolist() == fold_of("shop", [-4, 30]).tolist()


def test_fold_by_date_of_the_first_event(prepare):
    dataset = prepare(BASE + '[fold]\nby = "date"\nvalid = 2\ntest = 9\n', log=LOG.replace("bob,y,1", "bob,y,3"))
    assert dataset.fold.tolist() == [0, 1, 2]


ITEMS = 'kind = "items"\nsource = "events"\n'


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ('where = [["kind", "==", "back"]]\nrepeats = true', [("ann", "w", 4)]),
        (
            "repeats = true",
            [
                ("ann", "w", 4),
                ("ann", "x", 4),
                ("ann", "z", 4),
                ("bob", "w", 3),
                ("bob", "x", 3),
                ("bob", "y", 3),
                ("cat", "y", 1),
            ],
        ),
        ('cut = "before"\nwhere = [["rating", ">=", 4]]', [("ann", "w", 2), ("ann", "x", 1), ("bob", "x", 1)]),
        ('cut = "before"\npick = "last"', [("ann", "w", 2), ("bob", "w", 2)]),
        ('cut = "before"\npick = "first"', [("ann", "x", 1), ("bob", "x", 1)]),
        ('cut = "before"\npick = "last"\nrepeats = true', [("ann", "x", 3), ("bob", "w", 2)]),
    ],
    ids=str,
)
def test_items_tasks(prepare, keys, want):
    assert rows(prepare(task(ITEMS + keys)), "t") == want


@pytest.mark.parametrize("events", [1, 4, 7])
def test_what_is_visible_does_not_depend_on_how_many_users_are_looked_at(prepare, monkeypatch, events):
    """Users have 4, 3 and 1 events: one user at a time, more than one, and all but the last."""
    monkeypatch.setattr(targets, "_EVENTS", events)
    want = [("ann", "w", 2), ("ann", "x", 1), ("bob", "w", 2), ("bob", "x", 1)]
    assert rows(prepare(task(ITEMS + 'cut = "before"')), "t") == want


@pytest.mark.parametrize("events", [1, 4, 7])
@pytest.mark.parametrize(("reduce", "want"), [("median", [3.5, 3.5, 5]), ("sum", [13, 7, 5]), ("max", [5, 4, 5])])
def test_a_reduce_does_not_depend_on_how_many_users_are_looked_at(prepare, monkeypatch, events, reduce, want):
    monkeypatch.setattr(labels, "_EVENTS", events)
    keys = f'source = "events"\nkind = "regression"\nreduce = "{reduce}"\ncolumn = "rating"'
    assert [target for _, target, _ in rows(prepare(task(keys)), "t")] == want


@pytest.mark.parametrize("cut", ["end", "before"])
@pytest.mark.parametrize(("pick", "want"), [("first", ["a"]), ("last", ["a"]), ("all", ["a", "b"])])
def test_the_picked_event_is_the_users_first_or_last_of_any_item(prepare, cut, pick, want):
    log = "user_id,item_id,time,kind\nann,h,10,view\nann,a,20,buy\nann,b,30,buy\nann,a,40,buy\n"
    toml = BASE + f'where = [["kind", "==", "view"]]\n[[task]]\nname = "t"\n{ITEMS}where = [["kind", "==", "buy"]]\n'
    dataset = prepare(toml + f'pick = "{pick}"\ncut = "{cut}"\n', log=log)
    names = originals(dataset, "items.parquet", "item_id")
    table = dataset.task("t")
    assert sorted({names[item] for item in table.target.tolist()}) == want
    assert cut == "end" or table.time[-1] == {"first": 20, "last": 40, "all": 30}[pick]
    assert pick != "all" or len(table) == 2, "the second `a` has the same history before it: one target, not two"


@pytest.mark.parametrize("repeats", ["", "repeats = true\n"])
@pytest.mark.parametrize("until", ["", "until = 8\n"])
def test_a_task_that_begins_before_the_histories_end_is_refused(prepare, until, repeats):
    """The buy at 7 is to be foretold; a case for it, bought at 9 or at 7, must not be part of the input."""
    log = "user_id,item_id,time,kind\nann,a,1,view\nann,b,2,view\nann,case,7,view\nann,x,7,buy\nann,case,9,view\n"
    toml = BASE + until + f'where = [["kind", "==", "view"]]\n[[task]]\nname = "t"\n{ITEMS}from = 5\n{repeats}'
    with pytest.raises(ValueError, match=r"task 't': . events of the histories, .* its `from`, 5: .* until = 5"):
        prepare(toml, log=log)


def test_a_catalogue_holds_all_items_of_the_subset_that_occur(prepare):
    """Also those that are nobody's target: ranking fewer is easier."""
    names = [f"i{n}" for n in range(30)]
    log = "user_id,item_id,time,rating\n" + "".join(f"ann,{x},{n},{n % 5}\n" for n, x in enumerate(names))
    keys = ITEMS + 'items = { modulo = 2 }\nwhere = [["rating", ">=", 4]]\n'
    dataset = prepare(BASE + f'[[task]]\nname = "t"\n{keys}', log=log)
    known = originals(dataset, "items.parquet", "item_id")
    held = [x for x in sorted(names) if stable_hash(f"shop:item:{x}") % 2 == 0]
    assert [known[item] for item in dataset.task("t").spec.catalogue] == held
    assert len(held) > len(dataset.task("t")) > 0


def test_future_items_leave_out_what_was_seen(prepare):
    toml = task(ITEMS + "from = 5\n").replace('time = "time"', 'time = "time"\nuntil = 5')
    dataset = prepare(toml)
    assert histories(dataset) == {"ann": ["z", "x", "w", "x"], "bob": ["y"]}
    assert rows(dataset, "t") == [("bob", "w", 1), ("bob", "x", 1)]
    assert dataset.task("t").time.tolist() == [5, 7]


def test_a_subset_is_kept_out_of_all_inputs(prepare):
    held = [item for item in "wxyz" if stable_hash(f"shop:item:{item}") % 2 == 1]
    assert 0 < len(held) < 4
    dataset = prepare(task(ITEMS + "items = { modulo = 2, remainder = 1 }"))
    names = originals(dataset, "items.parquet", "item_id")
    assert not {item for items in histories(dataset).values() for item in items} & set(held)
    assert {names[i] for i in dataset.task("t").spec.catalogue} == {target for _, target, _ in rows(dataset, "t")}
    assert {target for _, target, _ in rows(dataset, "t")} <= set(held)


def test_items_table_names_subsets_and_conditions(prepare, tmp_path):
    (tmp_path / "items.csv").write_text("item_id;new\nx;false\ny;false\nz;true\nw;true\nv;true\n")
    toml = task(ITEMS + 'items = { where = [["new", "==", true]] }\nwhere = [["new", "==", true]]')
    dataset = prepare(toml + '\n[items]\nfile = "items.csv"\ndelimiter = ";"\n')
    assert histories(dataset) == {"ann": ["x", "x"], "bob": ["y", "x"], "cat": ["y"]}
    assert rows(dataset, "t") == [("ann", "w", 2), ("ann", "z", 2), ("bob", "w", 2)]
    assert dataset.num_items == 5  # v is known though nobody bought it
    assert len(dataset.task("t").spec.catalogue) == 3


EVENTS = 'source = "events"\n'


@pytest.mark.parametrize(
    ("keys", "want", "labels"),
    [
        ('kind = "binary"\ncolumn = "city"', [("ann", 0, 4), ("bob", 1, 3)], ("Oslo", "Rome")),
        (
            'kind = "binary"\ncolumn = "city"\nlabels = ["Rome", "Oslo"]',
            [("ann", 1, 4), ("bob", 0, 3)],
            ("Rome", "Oslo"),
        ),
        ('kind = "binary"\ncolumn = "city"\npositive = "Oslo"', [("ann", 1, 4), ("bob", 0, 3)], ("other", "Oslo")),
        ('kind = "binary"\ncolumn = "age"\nthreshold = 30', [("ann", 0, 4), ("bob", 1, 3)], ("below 30", "30 or more")),
        (
            'kind = "classes"\ncolumn = "age"\nbins = [25, 31]',
            [("ann", 1, 4), ("bob", 2, 3)],
            ("below 25", "25 to 31", "31 or more"),
        ),
        (
            'kind = "classes"\ncolumn = "city"\nlabels = ["Bern", "Rome", "Oslo"]\nignore = ["Rome"]',
            [("ann", 2, 4)],
            ("Bern", "Rome", "Oslo"),
        ),
        ('kind = "regression"\ncolumn = "age"', [("ann", 25, 4), ("bob", 31, 3)], None),
        (
            EVENTS + 'kind = "binary"\nwhere = [["kind", "==", "back"]]',
            [("ann", 1, 4), ("bob", 0, 3), ("cat", 0, 1)],
            ("0", "1"),
        ),
        (EVENTS + 'kind = "regression"\nreduce = "count"', [("ann", 4, 4), ("bob", 3, 3), ("cat", 1, 1)], None),
        (
            EVENTS + 'kind = "regression"\nreduce = "median"\ncolumn = "rating"',
            [("ann", 3.5, 4), ("bob", 3.5, 3), ("cat", 5, 1)],
            None,
        ),
        (
            EVENTS + 'kind = "regression"\nreduce = "sum"\ncolumn = "rating"',
            [("ann", 13, 4), ("bob", 7, 3), ("cat", 5, 1)],
            None,
        ),
        (
            EVENTS + 'kind = "regression"\nreduce = "mean"\ncolumn = "rating"\nuntil = 5',
            [("ann", 3.25, 4), ("bob", 3, 3)],
            None,
        ),
        (
            EVENTS + 'kind = "binary"\nreduce = "min"\ncolumn = "rating"\nthreshold = 3',
            [("ann", 0, 4), ("bob", 1, 3), ("cat", 1, 1)],
            None,
        ),
        (
            EVENTS + 'kind = "regression"\nreduce = "last"\ncolumn = "rating"',
            [("ann", 2, 4), ("bob", 4, 3), ("cat", 5, 1)],  # the last rating of bob, not his last event
            None,
        ),
        (
            EVENTS + 'kind = "classes"\nreduce = "first"\ncolumn = "kind"\nwhere = [["time", ">=", 3]]',
            [("ann", 0, 4), ("bob", 1, 3), ("cat", 1, 1)],
            ("back", "buy"),
        ),
        (
            EVENTS + 'kind = "classes"\nreduce = "last"\ncolumn = "item_id"\nuntil = 9',
            [("ann", 1, 4), ("bob", 0, 3)],  # no event of cat is before 9
            ("w", "x"),
        ),
    ],
    ids=str,
)
def test_labels(prepare, keys, want, labels):
    dataset = prepare(task(keys))
    assert rows(dataset, "t") == want
    if labels is not None:
        assert dataset.task("t").spec.labels == labels


def test_a_reduce_of_text_names_those_that_take_it(prepare):
    words = r"task 't': column 'kind' of reduce 'max' \(first and last take text\) must hold numbers, got string"
    with pytest.raises(ValueError, match=words):
        prepare(task(EVENTS + 'kind = "classes"\nreduce = "max"\ncolumn = "kind"'))


@pytest.mark.parametrize(
    ("until", "keys", "words"),
    [
        ("", "from = 5", "3 events of the histories, which have no end, are not before its `from`, 5"),
        ("until = 8", "from = 5", "2 events of the histories, which end at 8, are not before its `from`, 5"),
        ("until = 8", "from = 5\nuntil = 6", "2 events"),  # of these one is after the task's window
        ("until = 8", 'from = 5\nwhere = [["rating", "==", 1]]', "2 events"),  # none of them is a label's
        ('where = [["kind", "==", "buy"]]', 'from = 3\nwhere = [["kind", "==", "back"]]', "4 events"),
        ("until = 5", "from = 5", None),
        ("until = 8", "from = 8", None),
        ("until = 8", "", None),  # describes what is visible
        ('where = [["kind", "==", "back"]]', "from = 4", None),  # histories without an end, but none later than 3
    ],
    ids=str,
)
def test_no_label_is_learned_from_what_came_after_it_begins(prepare, until, keys, words):
    toml = BASE + until + f'\n[[task]]\nname = "t"\nkind = "regression"\nreduce = "count"\n{EVENTS}{keys}\n'
    if words is None:
        assert len(prepare(toml, LOG + "ann,y,9,buy,5\n").task("t"))
        return
    with pytest.raises(ValueError, match=r"Write \[events\] until = \d, or leave `from` out") as error:
        prepare(toml)
    assert words in str(error.value)


def test_bins_are_quantiles_of_the_train_users(prepare):
    log = "user_id,item_id,time\n" + "".join(f"{i},1,1\n" for i in range(500))
    users = "user_id,age\n" + "".join(f"{i},{(i * 7919) % 500}\n" for i in range(500))
    dataset = prepare(task('kind = "classes"\ncolumn = "age"\nbins = 4'), log=log, users=users)
    table = dataset.task("t")
    train = dataset.fold[table.user] == 0
    assert np.ptp(np.bincount(table.target[train])) <= 1
    assert table.spec.num_classes == 4


def test_a_killed_or_failed_run_leaves_no_dataset(prepare, tmp_path):
    with pytest.raises(ValueError, match="no event satisfies"):
        prepare(task(ITEMS + 'where = [["kind", "==", "gift"]]'))
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_a_description_reaches_the_task(prepare):
    dataset = prepare(task('kind = "regression"\ncolumn = "age"\ndescription = "how old"\nmetric = "mae"'))
    saved = json.loads((dataset.path / "tasks" / "t.json").read_text())
    assert saved == {"name": "t", "kind": "regression", "description": "how old", "metric": "mae", "repeats": False}


def test_ids_that_are_text_by_name_are_in_the_order_of_text(prepare):
    log = "user_id,item_id,time\n1,7,1\n1,10,2\n"
    for text, want in (("", ["7", "10"]), ('text = ["item_id"]', ["10", "7"])):
        assert list(originals(prepare(BASE + text, log=log), "items.parquet", "item_id").values()) == want
