"""Run the command as `python -m ray_soup.cli`."""

from ray_soup.cli import main

if __name__ == "__main__":
    main()
