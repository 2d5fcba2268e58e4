/**
 * The byte-level alphabet of GPT-2 style vocabularies: each byte has one printable character. Printable Latin-1
 * stands for itself, the other 68 bytes get U+0100 onwards in order.
 */
export const BYTE_OF_CHARACTER: ReadonlyMap<string, number> = buildAlphabet(); // [256]

function buildAlphabet(): Map<string, number> {
  const alphabet = new Map<string, number>();
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    const isPrintable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte < 0x100 && byte !== 0xad);
    alphabet.set(String.fromCharCode(isPrintable ? byte : next++), byte);
  }
  return alphabet;
}
