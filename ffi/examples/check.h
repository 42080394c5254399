/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* What the examples do when something is not as it should be: say so and stop. */
#ifndef AEROSTAT_EXAMPLES_CHECK_H
#define AEROSTAT_EXAMPLES_CHECK_H

#include <stdio.h>
#include <stdlib.h>

/* Stops the program unless a condition holds. */
#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);              \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

/* Stops the program if a call into the library fails, with the library's explanation. */
#define OK(call)                                                                                   \
    do {                                                                                           \
        int ok_result = (call);                                                                    \
        if (ok_result < 0) {                                                                       \
            fprintf(stderr, "%s:%d: %s: %d, %s\n", __FILE__, __LINE__, #call, ok_result,           \
                    aerostat_last_error());                                                        \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#endif
