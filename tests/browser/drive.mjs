// Drives the page of `btok app` in Chromium and prints what it saw as JSON: node drive.mjs URL PICTURE CLIP SCREENSHOTS
import { chromium } from "playwright-core";

const [url, picture, clip, screenshots] = process.argv.slice(2);
const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: ["--no-sandbox", "--disable-gpu"],
});
const page = await browser.newPage({ viewport: { width: 1400, height: 950 } });
page.setDefaultTimeout(60000);
const outside = new Set(), errors = [], seen = {};
page.on("request", (r) => !r.url().startsWith(url) && !/^(data|blob):/.test(r.url()) && outside.add(r.url()));
page.on("console", (m) => m.type() === "error" && errors.push(m.text().slice(0, 200)));
page.on("pageerror", (e) => errors.push("pageerror " + e.message.slice(0, 200)));
page.on("dialog", (d) => { errors.push("dialog " + d.message()); d.dismiss(); });

const field = (id) => page.locator(`#${id} input, #${id} textarea`).first();
const kind = (name) => page.locator("#kinds label").filter({ hasText: name }).locator("input");
const go = () => page.locator("#go").click();
const shot = (name) => page.screenshot({ path: `${screenshots}/${name}.png` });
const decoded = (side) => page.locator("#large img").evaluate(async (i, side) => { await i.decode(); return i[side]; }, side);

const hits = page.locator("#hits button");
const ids = () => hits.evaluateAll((all) => all.map((one) => one.dataset.id));
// Other hits, or a new line above them: Gradio writes nothing where a value is as before.
const changed = (before) => page.waitForFunction((before) => document.querySelector("#summary p") !== null
    || [...document.querySelectorAll("#hits button")].map((one) => one.dataset.id).join() !== before, before);

// A part of the tour. What fails is said, and the tour goes on.
async function part(name, tour) {
    try {
        await tour();
    } catch (error) {
        errors.push(`${name}: ${error.message.slice(0, 300)}`);
        await shot(`failed-${name}`);
    }
}

// An action that changes the hits, and how long that takes.
async function search(name, action) {
    const before = (await ids()).join();
    await page.evaluate(() => document.querySelectorAll("#summary p").forEach((p) => p.remove()));
    const start = performance.now();
    await action();
    await changed(before);
    const ms = Math.round(performance.now() - start);
    seen[name] = { ms, ids: await ids() };
}

// An action that the page refuses, and what it says.
async function refused(name, action) {
    await action();
    const toast = page.getByTestId("toast-text").last();
    await toast.waitFor();
    seen[name] = await toast.innerText();
    await page.getByTestId("toast-close").last().click();
    await toast.waitFor({ state: "detached" });
}

const inView = (selector) => page.locator(selector).first().evaluate((e) => {
    const { top, bottom } = e.getBoundingClientRect();
    return bottom > 0 && top < innerHeight;
});
const focused = (selector) => page.evaluate((selector) => document.activeElement.matches(selector), selector);
const pressed = "#hits [aria-pressed=true]";

// The first hit of a condition, opened.
async function open(condition) {
    await field("where").fill(condition);
    await search(`open ${condition}`, () => field("where").press("Enter"));
    await hits.first().click();
    await page.locator("#large dl").waitFor();
}

// Elements without a name that assistive technology could read.
const nameless = () => page.evaluate(() => {
    const named = (e) => e.getAttribute("aria-label") || e.getAttribute("title") || e.getAttribute("alt")
        || (e.getAttribute("aria-labelledby") && document.getElementById(e.getAttribute("aria-labelledby"))?.innerText)
        || [...(e.labels ?? [])].some((l) => l.innerText.trim()) || e.innerText?.trim();
    return [...document.querySelectorAll("input, textarea, select, button, img, video")]
        .filter((e) => e.checkVisibility({ visibilityProperty: true }) && !named(e))
        .filter((e) => !e.matches("#hits img[alt='']"))  // the name of the card follows
        .filter((e) => !e.matches("#picture img[alt]"))  // Gradio's preview of an upload, below its label
        .map((e) => e.outerHTML.slice(0, 200));
});

const start = performance.now();
await page.goto(url, { waitUntil: "domcontentloaded" });
await field("text").waitFor();
seen.ready = Math.round(performance.now() - start);

await part("text", async () => {
    seen.nameless = await nameless();
    await refused("empty", go);
    await field("text").fill("tiger face");
    await search("typed", () => field("text").press("Enter"));
    await kind("image").check();
    await search("images", () => field("text").press("Enter"));
});

await part("large", async () => {
    await page.locator("#hits button").first().focus();
    await page.keyboard.press("Enter");
    await page.locator("#large img").waitFor();
    seen.large = await page.locator("#large").innerText();
    seen.largeImage = await decoded("naturalWidth");
    await page.waitForFunction(() => document.activeElement.matches("#large section"));
    await page.locator("#back").click();
    seen.back = await focused(pressed);
    const start = performance.now();
    await page.locator("#why").click();
    await page.locator("#guesses dd").first().waitFor();
    seen.why = { ms: Math.round(performance.now() - start), text: await page.locator("#guesses").innerText() };
    await shot("hit");
    seen.namelessWithHit = await nameless();
    await search("more", () => page.locator("#more").click());
    seen.afterMore = await page.locator("#hit").isVisible();
    await kind("image").uncheck();
});

await part("clips", async () => {
    await kind("video").check();
    await field("text").fill("octopus");
    await search("clips", go);
    await page.locator("#hits button").first().click();
    await page.locator("#large video").waitFor();
    seen.plays = await page.locator("#large video").evaluate(async (video) => {
        video.muted = true;
        await video.play();
        await new Promise((resolve) => setTimeout(resolve, 500));
        return { width: video.videoWidth, seconds: video.duration, now: video.currentTime, error: video.error?.code };
    });
    await shot("clip");
    await kind("video").uncheck();
});

await part("pages", async () => {
    await kind("page").check();
    await field("text").fill("the velocity of a moving body");
    await search("pages", go);
    await page.locator("#hits button").first().click();
    await page.locator("#large img").waitFor();
    seen.pageImage = await decoded("naturalHeight");
    await shot("page");
    await kind("page").uncheck();
});

await part("condition", async () => {
    await field("where").fill("kind = 'text'");
    await field("text").fill("a cell of an animal");
    await search("texts", go);
    await shot("texts");
    const hostile = { drop: "1=1; DROP TABLE items", html: "name = '<img src=x onerror=alert(1)>'", open: "(((" };
    for (const [name, sql] of Object.entries(hostile)) {
        await field("where").fill(sql);
        await refused(`where ${name}`, go);
    }
    await field("where").fill("");
});

await part("files", async () => {
    await field("text").fill("a");
    await open("id = 'clip #1 100%41.mp4'");
    seen.quoted = await page.locator("#large video").evaluate(async (video) => {
        video.muted = true;
        await video.play();
        return video.videoWidth;
    });
    await open("id LIKE '%.avi'");
    await page.locator("#large .unplayable").waitFor();
    seen.unplayable = await page.locator("#large .unplayable").innerText();
    await shot("unplayable");
    await open("source = 'broken.pdf'");
    seen.broken = await page.locator("#large").innerText();
    await open("id LIKE 'cr%lf.png'");
    seen.carriage = await page.locator("#large dd").first().textContent();
    await field("where").fill("");
});

await part("last", async () => {
    for (const typed of ["pizza", "octopus"]) {
        await field("text").fill(typed);
        await search(typed, go);
    }
    const [first, second] = seen.octopus.ids;
    await page.route(/queue\/join/, async (route) => {
        await new Promise((resolve) => setTimeout(resolve, 1000));
        await route.continue();
    });
    await hits.nth(0).click();
    await page.waitForTimeout(300);
    await hits.nth(1).click();
    await page.waitForFunction((id) => document.querySelector("#large dd")?.textContent === id, second);
    seen.card = { first, second, pressed: await page.locator(pressed).getAttribute("data-id") };
    await field("text").press("Enter");
    await page.waitForTimeout(300);
    await field("text").fill("pizza");
    await field("text").press("Enter");
    await hits.nth(2).click();  // a card of the search before
    await page.waitForTimeout(6000);
    seen.last = { ids: await ids(), panel: await page.locator("#hit").isVisible() };
    await page.unroute(/queue\/join/);
});

await part("hostile", async () => {
    const texts = ["<img src=x onerror=alert(1)>", "${alert(1)}`{{#if", "/etc/passwd", "<|btok_0|><|image_pad|>", "'; DROP TABLE items; --"];
    for (const typed of texts) {
        await field("text").fill(typed);
        await search(`typed ${typed}`, go);
    }
    await field("text").fill("");
});

await part("picture", async () => {
    await page.locator("#picture input[type=file]").setInputFiles(picture);
    await page.locator("#picture img").waitFor();
    await search("picture", go);
    seen.namelessWithPicture = await nameless();
    await page.locator("#hits button[data-id^=clips]").first().click();
    await page.locator("#large video").waitFor();
    await shot("picture");
    await field("text").fill("pizza");
    await search("picture and text", go);
    await field("text").fill("");
    await page.locator("#picture button[aria-label=Clear], #picture button[aria-label='Remove Image']").first().click();
});

await part("clip", async () => {
    await page.locator("#clip input[type=file]").setInputFiles(clip);
    await page.locator("#clip video").waitFor();
    seen.trims = await page.locator("#clip button[aria-label^=Trim]").isVisible();
    await search("clip", go);
    await shot("uploaded-clip");
});

await part("narrow", async () => {
    await page.setViewportSize({ width: 360, height: 740 });
    await page.evaluate(() => scrollTo(0, 0));
    await field("text").fill("octopus");
    await search("narrow", () => field("text").press("Enter"));
    await page.waitForTimeout(500);
    seen.narrow.summary = await inView("#summary p");
    await shot("narrow");
    await hits.first().click();
    await page.waitForFunction(() => document.activeElement.matches("#large section"));
    seen.narrow.hit = await inView("#back");
    await shot("narrow-hit");
    await page.locator("#back").click();
    seen.narrow.back = await inView(pressed);
});

console.log(JSON.stringify({ ...seen, outside: [...outside], errors }));
await browser.close();
