import json
import os
import sys

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "get_weather", "description": "The weather of a city.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]

messages = [{"role": "user", "content": "SAY Once upon a time."}]
if sys.argv[1] == "litellm":
    import litellm

    bridge = {"api_base": "http://127.0.0.1:14001", "api_key": "unused"}

    def ask(**more):
        return litellm.completion(model="anthropic/claude-sonnet-5-5", **bridge, messages=messages, tools=TOOLS, **more)
else:
    from openai import OpenAI

    client = OpenAI(base_url="http://127.0.0.1:4000", api_key=os.environ["LITELLM_MASTER_KEY"])

    def ask(**more):
        return client.chat.completions.create(model="sonnet", messages=messages, tools=TOOLS, **more)


text = ask().choices[0].message
messages += [text, {"role": "user", "content": "SAY They lived happily ever after."}]
pieces = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True)]
messages.append({"role": "assistant", "content": "".join(pieces)})
messages.append({"role": "user", "content": 'USE_TOOL get_weather INPUT={"city": "Paris"}END'})
called = ask().choices[0].message
messages.append(called)
for call in called.tool_calls:
    result = {"get_weather": "18C in {city}"}[call.function.name].format(**json.loads(call.function.arguments))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
told = ask().choices[0].message
print(json.dumps({"text": text.content, "pieces": pieces, "tool": told.content}))
