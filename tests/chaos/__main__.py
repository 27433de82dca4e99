"""`make chaos`: kills and other faults at random moments, mutated messages; exit status 1 if harm is done."""

import argparse
import logging
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from chaos.campaign import MODES, campaign
from fedmosaic.privacy.terminal import ending_children


@ending_children()
def main() -> int:
    """Run both parts and say what was found."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--hours", type=float, default=0.1, help="time for the runs; default: 6 minutes")
    parser.add_argument("--kills", type=int, default=0, help="so many, in place of a time")
    parser.add_argument("--messages", type=int, default=3000, help="mutations of each request and each file")
    parser.add_argument("--run", type=int, help="repeat the run of this number alone")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    chosen = parser.parse_args()
    logging.getLogger().addHandler(logging.NullHandler())
    place = Path(tempfile.mkdtemp(prefix="fedmosaic-chaos-"))
    print(f"SEED={chosen.seed}, in {place}", flush=True)
    # The kills first: processes are forked, and that only goes well before gRPC has begun.
    asked = chosen.seed, chosen.hours * 3600, chosen.kills, place, chosen.modes, chosen.run
    runs = campaign(*asked) if chosen.modes else []
    used = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    faults = [f"{run.place.name}: {fault}" for run in runs for fault in run.faults]
    mutated = 0
    if chosen.messages:
        from chaos.formats import mutate_everything

        mutated, found = mutate_everything(place / "mutations", chosen.seed, chosen.messages)
        faults += found
    befallen = dict(+sum((run.killed for run in runs), Counter()))
    print(f"{len(runs)} runs, {used:.0f} s of the processor: {befallen}")
    print(f"{mutated} mutated messages and files; {len(faults)} faults")
    for fault in faults:
        print(f"  {fault}")
    if faults:
        print(f"again: make chaos SEED={chosen.seed} [RUN=…]; what the runs left is in {place}")
    else:
        shutil.rmtree(place)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
