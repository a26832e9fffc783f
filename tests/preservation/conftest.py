"""What tests of projectors start from."""

import pytest
from peft import get_peft_model
from projected import CONFIGS


@pytest.fixture(params=CONFIGS)
def peft_model(request, make_model):
    return get_peft_model(make_model(), CONFIGS[request.param])
