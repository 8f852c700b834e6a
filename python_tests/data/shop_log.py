"""A small event log, and what was prepared of it in the log's own ids."""

import pyarrow.parquet as pq

LOG = """\
user_id,item_id,time,kind,rating
ann,x,2,buy,5
bob,y,1,buy,3
ann,z,1,buy,1
ann,x,4,buy,2
ann,w,3,back,5
bob,x,5,buy,4
cat,y,9,buy,5
bob,w,7,buy,
"""
USERS = "user_id,age,city\nbob,31,Rome\nann,25,Oslo\ndan,70,Bern\n"
BASE = 'name = "shop"\n[events]\nfile = "log.csv"\ntime = "time"\n'
USERS_TOML = '[users]\nfile = "users.csv"\n'


def originals(dataset, file, key):
    table = pq.read_table(dataset.path / file)
    return dict(zip(table[key].to_pylist(), table["original_id"].to_pylist(), strict=True))


def histories(dataset):
    """{user: items} in the log's own ids."""
    items = originals(dataset, "items.parquet", "item_id")
    users = [str(user) for user in dataset.user_id.tolist()]
    if (dataset.path / "users.parquet").exists():
        names = originals(dataset, "users.parquet", "user_id")
        users = [names[int(user)] for user in users]
    rows = zip(users, dataset.offsets[:-1], dataset.offsets[1:], strict=True)
    return {user: [items[i] for i in dataset.items[a:b].tolist()] for user, a, b in rows}


def rows(dataset, name):
    """[(user, target, cut)] of a task in the log's own ids."""
    items = originals(dataset, "items.parquet", "item_id")
    users = originals(dataset, "users.parquet", "user_id")
    table = dataset.task(name)
    targets = [items[t] if table.spec.kind == "items" else t for t in table.target.tolist()]
    names = [users[int(dataset.user_id[row])] for row in table.user]
    return sorted(zip(names, targets, table.cut.tolist(), strict=True))


def task(text):
    return BASE + USERS_TOML + '[[task]]\nname = "t"\n' + text
