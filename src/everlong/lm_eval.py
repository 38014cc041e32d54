"""lm-eval's own command line, with the model "everlong": `python -m everlong.lm_eval --model everlong
--model_args pretrained=FOLDER --tasks hellaswag`. lm-eval itself finds no models of other packages."""

import sys


def main() -> None:
    """Register the model; lm-eval does the rest."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        sys.exit("lm-eval is not installed: pip install 'everlong[eval]'")
    from .evaluation import harness  # noqa: F401

    cli_evaluate()


if __name__ == "__main__":
    main()
