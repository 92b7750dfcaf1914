import functools
import json
import operator

from langchain_anthropic import ChatAnthropic
from langchain_core.tools import tool

chat = ChatAnthropic(model="claude-sonnet-5-5", base_url="http://127.0.0.1:14001", api_key="unused")


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"18C in {city}"


model = chat.bind_tools([get_weather])
messages = [("user", "SAY Once upon a time.")]
text = model.invoke(messages)
messages += [text, ("user", "SAY They lived happily ever after.")]
chunks = list(model.stream(messages))
messages += [functools.reduce(operator.add, chunks), ("user", 'USE_TOOL get_weather INPUT={"city": "Paris"}END')]
called = model.invoke(messages)
results = [{"get_weather": get_weather}[call["name"]].invoke(call) for call in called.tool_calls]
told = model.invoke([*messages, called, *results])
print(json.dumps({"text": text.text, "pieces": [chunk.text for chunk in chunks], "tool": told.text}))
