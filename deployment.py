"""The deployment phase: predicted latencies and a link become a split plan."""

from neurosurgeon.cli.process import script

main = script("deployment", "deployment.py")

if __name__ == "__main__":
    raise SystemExit(main())
