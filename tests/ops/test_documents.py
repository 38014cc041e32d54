"""Pads and documents: what is gathered, what goes back, and whose state is left."""

import torch

from everlong.ops.documents import Documents, Piece

# Rows of a batch: . pads, letters the documents' tokens, capital where one starts.
ROWS = ["..abC.cD", "Abbbbbbb", "........", "A.B.C.D."]


def parse(continued):
    real = torch.tensor([[c != "." for c in row] for row in ROWS])
    starts = torch.tensor([[c.isupper() for c in row] for row in ROWS])
    return Documents.of(real, starts, continued)


def test_documents_of_a_batch():
    documents = parse(True)
    assert documents.row.tolist() == [0, 0, 0, 1, 2, 3, 3, 3, 3]
    assert documents.lengths.tolist() == [2, 2, 1, 8, 0, 1, 1, 1, 1]
    assert documents.fresh.tolist() == [False, True, True, True, False, True, True, True, True]
    assert documents.last.tolist() == [2, 3, 4, 8]
    assert parse(False).fresh.all(), "without a state every document is new"


def test_there_and_back():
    documents = parse(True)
    x = torch.randn(4, 8, 3)
    rows = documents.gather(x)
    assert rows.shape == (9, 8, 3)
    assert torch.equal(rows[1, :2], x[0, [4, 6]])
    assert not rows[1, 2:].any()
    real = torch.tensor([[c != "." for c in row] for row in ROWS])
    assert torch.equal(documents.scatter(rows), x * real[..., None])


def test_groups_hold_every_document_once_and_few_pads():
    documents, x = parse(True), torch.randn(4, 8, 3)
    groups = documents.groups()
    assert [g.lengths.tolist() for g in groups] == [[8], [2, 2, 1, 1, 1, 1, 1], [0]]
    assert torch.equal(
        sum(g.scatter(g.gather(x)) for g in groups), documents.scatter(documents.gather(x))
    )
    assert sorted(int(g.row[n]) for g in groups for n in g.last) == [0, 1, 2, 3]


def test_plain_batches_need_no_documents():
    real, none = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    start = none.clone()
    start[:, 0] = True
    assert Documents.of(real, none, True) is None
    assert Documents.of(real, none, False) is None
    assert Documents.of(real, start, False) is None
    assert Documents.of(real, start, True).fresh.all()


def test_nan_in_pads_stays_there():
    x = torch.full((4, 8, 1), torch.nan)
    for row, text in enumerate(ROWS):
        for t, c in enumerate(text):
            if c != ".":
                x[row, t] = 1.0
    assert parse(True).gather(x).isfinite().all()


def test_a_piece_is_taken_and_put_back():
    x = torch.arange(12.0).view(2, 6, 1)
    piece = Piece(torch.tensor([1, 4]), torch.tensor([3, 1]), x.device)
    part = piece.take(x)
    assert part[..., 0].tolist() == [[1, 2, 3], [10, 0, 0]]
    back = piece.put(torch.zeros_like(x), part)
    assert back[..., 0].tolist() == [[0, 1, 2, 3, 0, 0], [0, 0, 0, 0, 10, 0]]


def test_a_piece_of_chosen_rows_at_another_dimension():
    x = torch.arange(12.0).view(3, 1, 4)
    piece = Piece(torch.tensor([2, 0]), torch.tensor([2, 1]), x.device, rows=torch.tensor([2, 0]))
    part = piece.take(x, dim=2)
    assert part[:, 0].tolist() == [[10, 11], [0, 0]]
    back = piece.put(torch.ones_like(x), part, dim=2)
    assert back[:, 0].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 11, 12]]
