"""Operations that megatron-core names in signatures and that no layer here is made of."""


class Sequential: ...


class FusibleOperation: ...
