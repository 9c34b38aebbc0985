"""Compare two checkpoints, each a Hugging Face folder or a Megatron checkpoint of any layout.

Exit status: 0 equal (with --logits: in what they compute too), 1 different, 2 one of them cannot
be read, or holds tensors that its configuration does not describe.
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain, islice
from pathlib import Path

if __name__ == "__main__":
    # Modules are found from the repository root, not from beside this script.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.cli import printable, progress_bar, report_errors


def main() -> None:
    """Parse the command line, compare, and exit with the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A", help="checkpoint folder")
    parser.add_argument("b", metavar="B", help="checkpoint folder")
    parser.add_argument("--weights-only", action="store_true", help="skip optimizer state")
    parser.add_argument("--limit", type=int, default=20, help="differences to show")
    parser.add_argument(
        "--logits",
        action="store_true",
        help="also run both models: logits, KL, greedy continuation, first layer that differs",
    )
    parser.add_argument("--num-tokens", type=int, default=32, help="random tokens to run on")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens")
    parser.add_argument("--hf-config", metavar="DIR", help="config.json of Megatron checkpoints")
    parser.add_argument("--trust-pickle", action="store_true", help="unpickle legacy .pt files")
    args = parser.parse_args()
    from megatron_pg.checkpoint import (
        MegatronFolder,
        compare_logits,
        compare_training_state,
        compare_weights,
        is_torch_dist,
        open_weights,
    )

    with report_errors(), progress_bar("tensors") as progress:
        options = dict(hf_config=args.hf_config, trust_pickle=args.trust_pickle)
        a, b = (open_weights(path, **options) for path in (args.a, args.b))
        found = compare_weights(a, b, progress)
        megatron = [x for x in (a, b) if isinstance(x, MegatronFolder)]
        both_torch_dist = len(megatron) == 2 and all(is_torch_dist(x.path) for x in megatron)
        if both_torch_dist and not args.weights_only:
            found = chain(found, compare_training_state(*megatron))
        differences = list(islice(found, args.limit + 1))
    for line in differences[: args.limit]:
        print(printable(line))
    if len(differences) > args.limit:
        print(f"... more than {args.limit} differences")
    if megatron and not (both_torch_dist or args.weights_only):
        print("optimizer state not compared: only that of two torch_dist checkpoints is read")
    behaviour = None
    if args.logits and a.model.vocab_size != b.model.vocab_size:
        print("logits not compared: the vocabularies differ")
    elif args.logits:
        with report_errors():
            behaviour = compare_logits(a, b, args.num_tokens, args.seed)
        print(behaviour)
    equal = not differences and (behaviour is None or behaviour.equal)
    print(f"{args.a} and {args.b} {'are equal' if equal else 'differ'}")
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
