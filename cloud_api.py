"""The cloud: serve split inference to any number of edges."""

from neurosurgeon.cli.process import script

main = script("cloud", "cloud_api.py")

if __name__ == "__main__":
    raise SystemExit(main())
