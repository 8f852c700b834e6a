import pytest
from model_cases import make_model


@pytest.fixture
def model():
    """A frozen Transformer without tasks; modules with another one have a fixture of their own."""
    return make_model()
