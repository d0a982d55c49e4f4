"""What the official clients make of the server's answers; each call is one that their own documentation shows."""

import json
from typing import Literal

import anthropic
import openai
import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

QUESTION = [{"role": "user", "content": "How is the weather in Rome?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": WEATHER}}


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


@pytest.fixture(scope="module")
def client(base_url):
    return openai.OpenAI(base_url=base_url + "/v1", api_key="sesame", max_retries=0)


def check_weather(arguments):
    assert arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 7 and len(arguments) == 2


def test_models(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def test_completions(client):
    whole = client.completions.create(model="demo", prompt="The sea was", max_tokens=12, temperature=0, logprobs=2)
    choice = whole.choices[0]
    assert choice.finish_reason == "length" and whole.usage.completion_tokens == 12
    assert len(choice.logprobs.tokens) == 12 and all(len(top) >= 2 for top in choice.logprobs.top_logprobs)
    stream = client.completions.create(model="demo", prompt="The sea was", max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == choice.text


def test_chat_streams(client):
    ask = {"model": "demo", "messages": QUESTION, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    assert len(whole.choices[0].logprobs.content) == 16
    stream = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    with client.chat.completions.stream(**ask) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
    assert "".join(deltas) == text


def test_several_choices(client):
    ask = {"model": "demo", "messages": QUESTION, "max_tokens": 8, "n": 3, "seed": 5}
    first, again = (client.chat.completions.create(**ask) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) > 1


def test_tools(client):
    named = {"type": "function", "function": {"name": "weather"}}
    ask = {"model": "demo", "messages": QUESTION, "tools": [TOOL], "tool_choice": named, "seed": 3, "max_tokens": 300}
    ask["parallel_tool_calls"] = False
    message = client.chat.completions.create(**ask).choices[0].message
    call = message.tool_calls[0]
    assert call.function.name == "weather"
    check_weather(json.loads(call.function.arguments))
    with client.chat.completions.stream(**ask) as stream:
        names = [event.type for event in stream]
        streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert "tool_calls.function.arguments.done" in names
    assert streamed.function.arguments == call.function.arguments
    # The conversation goes on with the tool's answer.
    answer = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = [*QUESTION, message.model_dump(exclude_none=True), answer]
    after = client.chat.completions.create(model="demo", messages=messages, tools=[TOOL], max_tokens=8)
    assert after.choices[0].finish_reason in ("stop", "length")


def test_structured_outputs(client):
    ask = {"model": "demo", "messages": QUESTION, "response_format": Person, "seed": 2, "max_tokens": 400}
    person = client.chat.completions.parse(**ask).choices[0].message.parsed
    assert isinstance(person, Person)


def test_responses(client):
    whole = client.responses.create(model="demo", input="Tell me a story.", max_output_tokens=12, temperature=0)
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    with client.responses.stream(model="demo", input="Tell me a story.", max_output_tokens=12, temperature=0) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == whole.output_text == text
    flat = {"type": "function", "strict": True, **TOOL["function"]}
    call = client.responses.create(
        model="demo", input="weather?", tools=[flat], tool_choice={"type": "function", "name": "weather"},
        parallel_tool_calls=False,
    ).output[0]
    assert call.type == "function_call"
    check_weather(json.loads(call.arguments))
    parsed = client.responses.parse(model="demo", input="Who?", text_format=Person, max_output_tokens=400)
    assert isinstance(parsed.output_parsed, Person)


def test_embeddings(client):
    # The client asks for base64 by itself.
    got = client.embeddings.create(model="demo", input=["the sea", "the ocean"])
    assert [round(sum(x * x for x in entry.embedding), 3) for entry in got.data] == [1, 1]
    plain = client.embeddings.create(model="demo", input="the sea", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(got.data[0].embedding, abs=1e-6)


def test_errors(client, base_url):
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="demo", messages=QUESTION, temperature=-1)
    assert wrong.value.param == "temperature" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=base_url + "/v1", api_key="wrong").models.list()


@tool
def weather(city: Literal["Rome", "Oslo"], days: Literal[1, 2, 3]) -> str:
    """Tells the weather of a city."""
    return f"{city} {days}"


def test_langchain(base_url):
    model = ChatOpenAI(base_url=base_url + "/v1", api_key="sesame", model="demo", max_tokens=12, temperature=0)
    whole = model.invoke("Tell me a story.")
    assert "".join(chunk.content for chunk in model.stream("Tell me a story.")) == whole.content
    assert whole.usage_metadata["output_tokens"] == 12
    wide = ChatOpenAI(base_url=base_url + "/v1", api_key="sesame", model="demo", max_tokens=500, seed=4)
    call = wide.bind_tools([weather], tool_choice="weather", parallel_tool_calls=False).invoke("weather?").tool_calls[0]
    assert call["name"] == "weather"
    check_weather(call["args"])
    person = wide.with_structured_output(Person, method="json_schema").invoke("Who?")
    assert isinstance(person, Person)


def test_anthropic(base_url):
    client = anthropic.Anthropic(base_url=base_url, api_key="sesame", max_retries=0)
    ask = {"model": "demo", "system": "Be brief.", "messages": QUESTION}
    count = client.messages.count_tokens(**ask).input_tokens
    # Newer clients have no such argument of their own.
    greedy = {"extra_body": {"temperature": 0}}
    whole = client.messages.create(**ask, max_tokens=12, **greedy)
    used = whole.usage
    assert whole.stop_reason == "max_tokens" and used.output_tokens == 12
    assert used.input_tokens + used.cache_read_input_tokens == count
    with client.messages.stream(**ask, max_tokens=12, **greedy) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
    named = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    tools = [{"name": "weather", "input_schema": WEATHER}]
    with client.messages.stream(**ask, max_tokens=300, tools=tools, tool_choice=named) as stream:
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    check_weather(message.content[0].input)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="demo", messages=[{"role": "king", "content": "x"}], max_tokens=1)
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=base_url, api_key="wrong").messages.create(**ask, max_tokens=1)
