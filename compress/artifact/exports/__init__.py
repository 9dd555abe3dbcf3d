"""Files that deploy: ONNX, `.pt2` and a folder for the Hugging Face Hub, each checked after it was written."""

from compress.artifact.exports.writing import EXPORTS, check_exports, write_exports

__all__ = ["EXPORTS", "check_exports", "write_exports"]
