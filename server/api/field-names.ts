import { ApiError } from '../errors.js';

/** A field of chat requests, and what it is called in another API. */
export type FieldName = readonly [chat: RegExp, other: string];

/** A field's path as clients of another API write it. */
export function renamed<Text extends string | null>(path: Text, names: readonly FieldName[]): Text {
  return names.reduce<string | null>((text, [chat, other]) => text?.replace(chat, other) ?? null, path) as Text;
}

/** Does what is done for a chat request; errors name the fields that the client has sent. */
export async function withNames<Result>(names: readonly FieldName[], job: () => Promise<Result>): Promise<Result> {
  try {
    return await job();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    throw new ApiError(error.code, renamed(error.message, names), renamed(error.param, names));
  }
}
