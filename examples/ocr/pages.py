"""Images with text: a photographed page from scikit-image's wheel, and several drawn ones."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from examples import originals

WHITE, INK = (255, 255, 255), (20, 20, 40)


def gather() -> dict[str, bytes]:
    """Return the bytes of the image files by name."""
    data = originals.folder("skimage") / "data"
    receipt = ("Harbour Cafe", "2 Espresso 5.60", "1 Fish soup 12.50", "Total 18.10 EUR", "Thank you!")
    notice = drawn(("Moving as one:", "many requests, one batch", "open daily from 9 to 17"), (900, 420), 52)
    return {
        "page.png": (data / "page.png").read_bytes(),
        "receipt.png": png(drawn(receipt, (520, 460), 36)),
        "notice.jpg": encoded(notice, "JPEG"),
        "label.webp": encoded(drawn(("Serial No. 4711-0815", "Made in 2026"), (560, 200), 40), "WEBP"),
        "tilted.png": png(notice.rotate(8, Image.Resampling.BICUBIC, fillcolor=WHITE)),
        "upside-down.png": png(
            drawn(("This way up", "Handle with care"), (640, 240), 48).transpose(Image.Transpose.ROTATE_180)
        ),
        "cat.png": (data / "chelsea.png").read_bytes(),
        "empty.png": png(Image.new("RGB", (400, 300), WHITE)),
    }


def drawn(lines: Sequence[str], size: tuple[int, int], height: int) -> Image.Image:
    """Draw lines of text, `height` pixels high, in Pillow's own typeface on an image of `size` (width, height)."""
    image = Image.new("RGB", size, WHITE)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(height)
    for n, line in enumerate(lines):
        pen.text((size[0] // 12, height // 2 + n * size[1] // (len(lines) + 1)), line, INK, font)
    return image


def encoded(image: Image.Image, kind: str) -> bytes:
    """Return the image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    return encoded(image, "PNG")
