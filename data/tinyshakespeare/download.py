"""
Fetches Tiny Shakespeare, the text of the lecture (1,115,394 characters), to input.txt beside this
file. bigram.py and transformer.py learn from it once it is there.

    python data/tinyshakespeare/download.py
"""
import hashlib
import http.client
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TARGET = Path(__file__).resolve().with_name("input.txt")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def download(url=URL, target=TARGET, digest=SHA256, timeout=30):
    """Makes target hold the file at url; returns False if it did already, else True.

    timeout is in seconds, for the connection and for each wait for data. Raises OSError if the
    file cannot be had whole and ValueError if its SHA-256 is not digest. Either way target is
    left as it was, and nothing else behind.
    """
    target = Path(target)
    if target.exists() and sha256(target.read_bytes()) == digest:
        return False
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            data = response.read(10_000_000)  # ten times what is expected: enough, whatever is sent
    except http.client.HTTPException as error:  # what newer Pythons raise when an answer breaks off
        raise OSError(f"{url}: {error!r}") from None
    if sha256(data) != digest:
        raise ValueError(f"{url} sent {len(data):,} bytes that are not Tiny Shakespeare")
    handle, part = tempfile.mkstemp(dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(part, 0o644)
        os.replace(part, target)
    except BaseException:
        os.unlink(part)
        raise
    return True


if __name__ == "__main__":
    try:
        print(TARGET, "fetched" if download() else "is there already")
    except (OSError, ValueError) as error:
        sys.exit(f"download.py: {error}")
