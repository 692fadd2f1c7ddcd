/* Something to learn for whoever has nothing at hand yet: questions to a shop's support and the desk they belong to.
   Enough held-out bytes that Φ can be measured (1,280 state pairs), few enough to learn in a minute. */

const DESKS = {
  delivery: ["parcel", "package", "letter", "shipment", "courier", "box", "order", "delivery", "crate"],
  payment: ["invoice", "card", "refund", "bill", "receipt", "charge", "fee", "transfer", "balance"],
  account: ["password", "login", "profile", "username", "email", "settings", "photo", "address", "phone"],
};
const QUESTIONS = [
  "where is my {}?", "I need help with the {}, please", "the {} is wrong, can you look at it?", "I lost my {} yesterday",
  "a question about a {}", "who can see my {}?", "why did the {} change?", "how do I cancel the {}?",
  "is my {} safe with you?", "nobody answers me about the {}", "can I have a second {}?", "what happened to the {} of my wife?",
];

export const EXAMPLE_DOMAIN = "support";

/** The example as pasted text: "where is my parcel? => delivery" and so on, one per line. */
export function exampleText() {
  return Object.entries(DESKS).flatMap(([desk, words]) => words.flatMap((word) => QUESTIONS.map((question) => `${question.replace("{}", word)} => ${desk}`))).join("\n");
}
