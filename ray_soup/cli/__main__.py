"""Run the command as a process of its own."""

from ray_soup.cli import main
from ray_soup.exits import end_process


def run() -> None:
    """Run `ray-soup` or `python -m ray_soup.cli`, and end the process."""
    try:
        main()
    except SystemExit as ended:
        end_process(ended.code)


if __name__ == "__main__":
    run()
