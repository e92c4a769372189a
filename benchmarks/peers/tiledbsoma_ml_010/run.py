"""tiledbsoma-ml 0.1.0: the same epoch as this package's, by the same code."""

from measure import answer_with, request
from soma_epoch import soma_epoch

if __name__ == "__main__":
    answer_with(soma_epoch, request())
