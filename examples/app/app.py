"""The app as a Space of the Hub: searches the photos that lie beside this file, see README.md.

python app.py
"""

from pathlib import Path

from unicoder_vl_hf.app import PhotoApp, build_page, launch

HERE = Path(__file__).parent


def beside(name: str) -> Path | None:
    """Gives a folder beside this file, if it is there."""
    return HERE / name if (HERE / name).exists() else None


if __name__ == "__main__":
    app = PhotoApp(
        HERE / "model",
        HERE / "regions",
        beside("photos"),
        index=beside("images.index"),
        captions_index=beside("captions.index"),
    )
    page = build_page(app)
    launch(page)
    page.block_thread()
