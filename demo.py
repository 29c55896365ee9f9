"""The four networks on a photo, each split between an edge and a cloud on this machine."""

from neurosurgeon.cli.process import script

main = script("demo", "demo.py")

if __name__ == "__main__":
    raise SystemExit(main())
