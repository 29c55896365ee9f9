"""Kinds of modules: compiled ones, containers, shared and lazy parts, parts of torch with many settings."""

import functools
import io

import torch
from torch import nn

from tests.models.hard.table import REFUSED, RIGHT_OR_REFUSED, Base, Normed, Table, With, features, image

KINDS = Table("kinds")
COMPILED = r"script|torch\.jit|traced|export"


@KINDS.row(RIGHT_OR_REFUSED, COMPILED)
def scripted_part():
    net = Normed()
    net.conv = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()))
    return net


@KINDS.row(RIGHT_OR_REFUSED, COMPILED)
def scripted_whole():
    return torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7200, 4)).eval())


@KINDS.row(RIGHT_OR_REFUSED, COMPILED)
def traced_part():
    net = Normed()
    net.conv = torch.jit.trace(net.conv, features(1, 8, 16, 16))
    return net


@KINDS.row(RIGHT_OR_REFUSED, COMPILED)
def traced_whole():
    return torch.jit.trace(Normed().eval(), image())


@KINDS.row(RIGHT_OR_REFUSED, COMPILED)
def scripted_and_loaded():
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)).eval()), file)
    file.seek(0)
    return torch.jit.load(file)


class OwnMode(Base):
    """Its parts of torch.export refuse eval(): the mode was fixed when they were exported."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def train(self, mode=True):
        self.training = mode
        return self

    def forward(self, x):
        return self.classify(self.part(self.stem(x)))


@KINDS.row(RIGHT_OR_REFUSED, COMPILED)
def exported_part():
    conv = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()).eval()
    return OwnMode(torch.export.export(conv, (features(1, 8, 16, 16),)).module())


@KINDS.right
def symbolically_traced():
    return torch.fx.symbolic_trace(Normed().eval())


@KINDS.row(RIGHT_OR_REFUSED, r"quanti|trace")
def quantised_dynamic():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)


@KINDS.right
def script_function_inside():
    @torch.jit.script
    def activate(y: torch.Tensor) -> torch.Tensor:
        return y * torch.sigmoid(1.702 * y)

    return With(activate)


@KINDS.right
def nested_sequential():
    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 3))))
    return nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@KINDS.right
class InModuleList(Base):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x):
        y = self.stem(x)
        return self.classify(sum(block(y) * number for number, block in enumerate(self.blocks)))


@KINDS.right
class InModuleDict(Base):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleDict({"one": nn.Conv2d(8, 8, 1), "two": nn.Conv2d(8, 8, 3, padding=1)})

    def forward(self, x):
        y = self.stem(x)
        return self.classify(torch.stack([branch(y) for branch in self.branches.values()]).amax(0))


@KINDS.right
class InPlainList(Base):
    def __init__(self):
        super().__init__()
        self.parts = [nn.ReLU(), nn.Softmax(1)]
        self.tables = {"a": torch.arange(8.0), "b": [torch.ones(8), 2.0]}

    def forward(self, x):
        y = self.stem(x)
        for part in self.parts:
            y = part(y)
        return self.head(y.mean((2, 3)) * self.tables["a"] + self.tables["b"][0] * self.tables["b"][1])


@KINDS.right
class CalledInLoop(Base):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.stem(x)
        for _ in range(4):
            y = y + self.conv(y).tanh()
        return self.classify(y)


@KINDS.right
def shared_block():
    block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(nn.Conv2d(3, 8, 3), block, block, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@KINDS.right
class TwoNamesForPart(Base):
    def __init__(self):
        super().__init__()
        self.same = self.stem

    def forward(self, x):
        return self.classify(self.stem(x) + self.same(x * 2))


@KINDS.right
class PartCalledModule(Base):
    def __init__(self):
        super().__init__()
        self.module = nn.Linear(8, 8)
        self.network = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.module(self.network(self.stem(x).mean((2, 3)))))


@KINDS.right
def names_with_dots_and_digits():
    net = nn.ModuleDict({"0": nn.Conv2d(3, 8, 3), "a-b": nn.Conv2d(8, 8, 1), "class": nn.Conv2d(8, 4, 1)})

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = net

        def forward(self, x):
            for part in self.parts.values():
                x = part(x)
            return x.mean((2, 3))

    return Odd()


@KINDS.row(REFUSED, r"lazy|initiali[sz]|weights")
def lazy():
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(4))


@KINDS.right
def lazy_and_used():
    net = nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(4))
    net(image())
    return net


@KINDS.row(REFUSED, r"meta|weights")
def without_weights():
    return Base().to("meta")


@KINDS.row(REFUSED, r"meta|weights")
def part_without_weights():
    net = Base()
    net.head = nn.Linear(8, 6, device="meta")
    return net


@KINDS.right
def partial_as_part():
    return With(functools.partial(nn.functional.interpolate, scale_factor=0.5, mode="bilinear", align_corners=True))


@KINDS.right
def function_in_module():
    class Apply(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, y):
            return self.function(y)

    return nn.Sequential(nn.Conv2d(3, 8, 3), Apply(torch.tanh), Apply(lambda y: y.amax((2, 3))), nn.Linear(8, 4))


@KINDS.right
def without_parameters():
    return nn.Sequential(nn.AvgPool2d(4), nn.Softmax(1), nn.Flatten())


@KINDS.right
def identity_and_linear():
    return nn.Sequential(nn.Identity(), nn.Flatten(), nn.Identity(), nn.Linear(3072, 4), nn.Identity())


@KINDS.right
def data_parallel():
    return nn.DataParallel(Base())


# ---------------------------------------------------------------- parts with many settings


class Taking(nn.Module):
    """Calls one part, and returns what a function takes from its result."""

    def __init__(self, part, take):
        super().__init__()
        self.part, self.take = part, take

    def forward(self, *given, **named):
        return self.take(self.part(*given, **named))


SEQUENCE = features(2, 5, 8)
for name, build in {
    "lstm": lambda: Taking(nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True), lambda made: made[0][:, -1]),
    "lstm-state": lambda: Taking(nn.LSTM(8, 6, batch_first=True, proj_size=3), lambda made: made[1][1]),
    "gru": lambda: Taking(nn.GRU(8, 6, batch_first=True), lambda made: made),
    "rnn-of-relu": lambda: Taking(nn.RNN(8, 6, nonlinearity="relu"), lambda made: made[0]),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    "encoder-norm-first": lambda: nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, activation="gelu"),
    "layer-norm": lambda: nn.Sequential(nn.LayerNorm(8, eps=0.1), nn.GLU(), nn.RMSNorm(4)),
    "group-norm": lambda: nn.Sequential(nn.GroupNorm(5, 5), nn.LocalResponseNorm(3)),
}.items():
    KINDS.add(name, build, inputs=SEQUENCE)


@KINDS.row(inputs=SEQUENCE)
class LstmCellInLoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(8, 6)

    def forward(self, x):
        state = (x.new_zeros(2, 6), x.new_zeros(2, 6))
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0]


@KINDS.row(RIGHT_OR_REFUSED, r"depend|data|pack", inputs=(SEQUENCE, torch.tensor([5, 3])))
class PackedSequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=5)[0]


@KINDS.row(inputs=SEQUENCE)
class AttentionWithWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        made, weights = self.attention(x, x, x, need_weights=True, average_attn_weights=False)
        return made, weights


@KINDS.row(inputs=SEQUENCE)
class AttentionWithMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True, add_bias_kv=True, kdim=4)
        self.keys = nn.Linear(8, 4)

    def forward(self, x):
        mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
        keys = self.keys(x)
        return self.attention(x, keys, x, attn_mask=mask, need_weights=False)[0]


@KINDS.row(inputs=(SEQUENCE, features(2, 4, 8, seed=1)))
class WholeTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def forward(self, source, target):
        mask = self.transformer.generate_square_subsequent_mask(target.shape[1])
        return self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True)


@KINDS.row(inputs=(torch.tensor([1, 2, 4, 5, 4, 3]), torch.tensor([0, 2, 5])))
def embedding_bag():
    return nn.EmbeddingBag(10, 6, mode="mean")


@KINDS.row(inputs=(torch.tensor([[1, 2], [4, 3]]), features(2, 2)))
def embedding_bag_weighted():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(10, 6, mode="sum")

        def forward(self, tokens, weights):
            return self.bag(tokens, per_sample_weights=weights)

    return Weighted()


@KINDS.row(inputs=torch.tensor([[1, 2, 9]]))
def embedding_with_largest_norm():
    return nn.Sequential(nn.Embedding(10, 6, max_norm=1.0), nn.Linear(6, 3))


@KINDS.right
def pool_with_places():
    class Unpooled(Base):
        def __init__(self):
            super().__init__()
            self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

        def forward(self, x):
            y, places = self.pool(self.stem(x))
            return self.classify(self.unpool(y * 2, places))

    return Unpooled()
