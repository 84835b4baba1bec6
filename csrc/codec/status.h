// status.h - what a decoder found in its input. Decoders accept any bytes; they throw nothing but bad_alloc.
#pragma once

namespace lepton {

enum class Status : int {
  ok,
  truncated,    // the data ends before the last symbol
  trailing,     // bytes are left after the last symbol
  bad_mode,     // a chunk or plane mode that this version does not know
  bad_table,    // the code table describes no complete prefix code
  bad_padding,  // unused bits are not zero
  bad_code,     // an LZW code that stands for nothing yet
  too_long,     // more output than announced
  bad_header,   // not this kind of stream
  bad_sum,      // the checksum is another
};

inline const char* status_text(Status status) {
  switch (status) {
    case Status::ok:
      return "ok";
    case Status::truncated:
      return "the data ends too early";
    case Status::trailing:
      return "bytes are left over at the end";
    case Status::bad_mode:
      return "an unknown chunk or plane mode";
    case Status::bad_table:
      return "the code table describes no complete prefix code";
    case Status::bad_padding:
      return "padding bits are not zero";
    case Status::bad_code:
      return "a code that stands for nothing yet";
    case Status::too_long:
      return "more output than announced";
    case Status::bad_header:
      return "not a stream of this kind";
    case Status::bad_sum:
      return "its checksum does not match";
  }
  return "unknown status";
}

}  // namespace lepton
