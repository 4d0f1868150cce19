"""Look at a file that `dstee_jax.save` wrote, or write it dense for other programs.

python -m dstee_jax show model.safetensors
python -m dstee_jax unpack model.safetensors dense.safetensors --kernels out_in
"""

import argparse

from dstee_jax.files import reader
from dstee_jax.files.convert import save_dense
from dstee_jax.files.load import load


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m dstee_jax", None, __doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="the leaves: shape, type, form, density, bytes")
    unpack = commands.add_parser("unpack", help="a dense .safetensors file, as PyTorch reads it")
    for command in (show, unpack):
        command.add_argument("file", help="that dstee_jax.save wrote")
    unpack.add_argument("out", help="the dense file")
    orders = "axes of kernels: as JAX has them (default), or as PyTorch"
    unpack.add_argument("--kernels", choices=["in_out", "out_in"], default="in_out", help=orders)
    args = parser.parse_args(argv)
    try:
        if args.command == "show":
            print(reader.table(args.file))
        else:
            save_dense(args.out, load(args.file).params, kernels=args.kernels)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
