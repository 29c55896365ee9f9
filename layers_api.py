"""The layer study: latency, shape and transfer size of every layer."""

from neurosurgeon.cli.process import script

main = script("layers", "layers_api.py")

if __name__ == "__main__":
    raise SystemExit(main())
