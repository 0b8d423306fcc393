// The texts of the page that are small, or stand out from their ground by less than WCAG's 4.5 to 1.
(() => {
  const parts = (color) => color.match(/[\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = parts(color).map((part) => part / 255)
      .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if ((parts(color)[3] ?? 1) > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const faint = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility() || element.matches("script, .unseen")) continue;
    const style = getComputedStyle(element);
    const [more, less] = [light(style.color), light(ground(element))].sort((a, b) => b - a);
    if ((more + 0.05) / (less + 0.05) < 4.5 || parseFloat(style.fontSize) < 13) faint.push(texts.currentNode.data);
  }
  return faint;
})()
