import assert from 'node:assert/strict';
import { DOCUMENT, validatorsOf } from './harness.js';

const ours = validatorsOf(DOCUMENT);
const openaiDocument = process.env['RODIN_OPENAI_SPEC'];
const theirs = openaiDocument ? validatorsOf(openaiDocument) : null;
const compiled = new Map<string, ReturnType<typeof ours>>();

/** Validates a body against our document, and against OpenAI's where there is one. */
function check(ourName: string, theirName: string, body: unknown): void {
  for (const [whose, validators, schema] of [
    ['our', ours, ourName],
    ['OpenAI’s', theirs, theirName],
  ] as const) {
    if (validators === null) continue;
    const key = `${whose} ${schema}`;
    const validate = compiled.get(key) ?? validators(schema);
    compiled.set(key, validate);
    assert.ok(validate(body), `${key}: ${JSON.stringify(validate.errors)?.slice(0, 2000)}\n${JSON.stringify(body)}`);
  }
}

export const checkResponse = (body: unknown): void => check('Response', 'Response', body);
export const checkItemList = (body: unknown): void => check('ResponseItemList', 'ResponseItemList', body);
export const checkCount = (body: unknown): void => check('ResponseTokenCount', 'TokenCountsResource', body);
export const checkError = (body: unknown): void => check('Error', 'ErrorResponse', body);

/** OpenAI's schemas of single events: its schema of all of them says little about what is wrong. */
const EVENT_SCHEMAS: Readonly<Record<string, string>> = {
  'response.created': 'ResponseCreatedEvent',
  'response.queued': 'ResponseQueuedEvent',
  'response.in_progress': 'ResponseInProgressEvent',
  'response.output_item.added': 'ResponseOutputItemAddedEvent',
  'response.output_item.done': 'ResponseOutputItemDoneEvent',
  'response.content_part.added': 'ResponseContentPartAddedEvent',
  'response.content_part.done': 'ResponseContentPartDoneEvent',
  'response.reasoning_text.delta': 'ResponseReasoningTextDeltaEvent',
  'response.reasoning_text.done': 'ResponseReasoningTextDoneEvent',
  'response.output_text.delta': 'ResponseTextDeltaEvent',
  'response.output_text.done': 'ResponseTextDoneEvent',
  'response.function_call_arguments.delta': 'ResponseFunctionCallArgumentsDeltaEvent',
  'response.function_call_arguments.done': 'ResponseFunctionCallArgumentsDoneEvent',
  'response.completed': 'ResponseCompletedEvent',
  'response.incomplete': 'ResponseIncompleteEvent',
  'response.failed': 'ResponseFailedEvent',
};

export function checkEvent(event: any): void {
  const schema = EVENT_SCHEMAS[event.type];
  assert.ok(schema, `an event of the type ${event.type}`);
  check('ResponsesEvent', schema, event);
  if (event.response) checkResponse(event.response);
}

/** All events of a stream: each valid, counted from 0, every item and part begun and ended once, the response last. */
export function checkEvents(events: readonly any[]): any {
  events.forEach(checkEvent);
  assert.deepEqual(
    events.map((event) => event.sequence_number),
    events.map((_, index) => index),
  );
  assert.equal(events[0].type, 'response.created');
  const last = events.at(-1).response;
  assert.ok(last, 'the last event has the response');
  assert.equal(events.filter(({ type }) => /\.(completed|incomplete|failed)$/.test(type)).length, 1);
  const items: any[] = [];
  let isOpen = false;
  for (const event of events) {
    if (event.type === 'response.output_item.added') {
      assert.ok(!isOpen);
      isOpen = true;
      assert.equal(event.output_index, items.length);
      items.push({ ...event.item, text: '' });
    } else if (event.output_index !== undefined) {
      assert.ok(isOpen);
      const item = items.at(-1);
      assert.equal(event.output_index, items.length - 1);
      assert.equal(event.item_id ?? event.item.id, item.id);
      if (event.type.endsWith('.delta')) item.text += event.delta;
      if (event.text !== undefined) assert.equal(event.text, item.text);
      if (event.arguments !== undefined) assert.equal(event.arguments, item.text);
      if (event.type === 'response.output_item.done') {
        isOpen = false;
        assert.deepEqual(event.item, last.output[event.output_index]);
      }
    }
  }
  assert.ok(!isOpen);
  assert.equal(items.length, last.output.length);
  for (const [index, { id, type }] of last.output.entries())
    assert.deepEqual([id, type], [items[index].id, items[index].type]);
  return last;
}

export function checkErrorFrame(frame: unknown): void {
  check('ResponsesErrorFrame', 'ResponseWsError', frame);
}
