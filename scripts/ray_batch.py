"""`minivlm batch` on Ray Data: two workers on this machine, one model each, over a table of images.

    pip install "minivlm[ray]" && python scripts/ray_batch.py --rows 12

On a cluster: `ray.init(address="auto")`, a table on shared storage, `num_gpus=1`, and a larger checkpoint.
"""

import argparse
import logging
import os
from pathlib import Path

# Ray counts its users unless told not to
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray

from minivlm.app.batch import Answerer

IMAGE = Path(__file__).parents[1] / "docs" / "shapes.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-idefics2")
    parser.add_argument("--question", default="What number is written?")
    parser.add_argument("--table", help="a parquet file with a column of images (default: one image many times)")
    parser.add_argument("--rows", type=int, default=12, help="of the table that is made by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", help="a folder for parquet files of answers (default: print them)")
    arguments = parser.parse_args()

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.init(num_cpus=arguments.workers, include_dashboard=False, log_to_driver=False)
    if arguments.table:
        table = ray.data.read_parquet(arguments.table)
    else:
        image = IMAGE.read_bytes()
        table = ray.data.from_items([{"id": number, "image": image} for number in range(arguments.rows)])
    answers = table.map_batches(
        Answerer,
        fn_constructor_kwargs={"model": arguments.model, "question": arguments.question, "max_new_tokens": 32},
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=arguments.workers),
        num_cpus=1,
    )
    if arguments.out:
        answers.drop_columns(["image"]).write_parquet(arguments.out)
    else:
        for row in answers.iter_rows():
            print(row["id"], row["answer"] or row["error"], flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
