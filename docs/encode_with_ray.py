"""User vectors of a Parquet file by Ray Data: python encode_with_ray.py RUN HISTORIES.parquet OUT TASK...

HISTORIES has user_id and items (a list of ids, oldest first). OUT is a folder of Parquet files. Leave a CPU or two
beside those of the workers: reading and writing need them.
"""

import sys

import ray

from pcl_ext import Predictor


def main(run: str, histories: str, out: str, *tasks: str, workers: int = 2) -> None:
    users = ray.data.read_parquet(histories).select_columns(["user_id", "items"])
    vectors = users.map_batches(
        Predictor,  # every worker opens the run once
        fn_constructor_args=(run,),
        fn_constructor_kwargs={"encode": list(tasks), "keep": ["user_id"]},
        batch_format="pyarrow",
        batch_size=4096,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
    )
    vectors.write_parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
